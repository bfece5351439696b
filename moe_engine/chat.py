"""Chat templates: Jinja programs inside model files, rendered in a sandbox.

The file is not trusted: a template can neither reach Python objects nor change its inputs.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_engine.errors import ConfigError, ModelFormatError


class _Refused(TemplateError):
    """A template called raise_exception: it does not accept these messages."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here only its content matters."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Powers are refused: no template needs them, and one can outgrow any memory."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> NoReturn:
        raise SecurityError("the ** operator is not allowed")


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would turn < and & into escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(template)


def render_chat(template: str, source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Render `messages` with the Jinja text `template`; `source` names its file and key in errors.

    Raises: ModelFormatError if the template itself is broken or does forbidden things, ConfigError if it
    cannot digest these messages and variables.
    """
    if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError("messages: expected a list of mappings such as {'role': 'user', 'content': 'Hi'}")
    try:
        return _compile(template).render(messages=[dict(message) for message in messages], **variables)
    except TemplateSyntaxError as error:
        raise ModelFormatError(f"{source}: invalid Jinja, line {error.lineno}: {error}") from error
    except SecurityError as error:
        raise ModelFormatError(f"{source}: the template does something forbidden: {error}") from error
    except _Refused as error:
        raise ConfigError(f"{source}: the template does not accept these messages: {error}") from error
    except Exception as error:
        raise ConfigError(f"{source}: cannot render these messages: {error!r}") from error
