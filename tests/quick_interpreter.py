"""Triton's interpreter without what most of its time goes into and nobody uses. The kernels compute what they did."""

from dataclasses import replace
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replace_language = interpreter._patch_lang


def make_quick() -> None:
    """To be called before the first kernel runs."""
    interpreter._patch_lang = _replace_language_once
    # Checks for overflows, which are computed at each addition; without `debug` the results are thrown away.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _replace_language_once(function: FunctionType) -> Any:
    """Puts the interpreted language in place of Triton's at a launch, but not again at each call inside of it."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _replace_language(function)
    return None


@cache
def _languages(function: FunctionType) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]
