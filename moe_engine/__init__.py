"""Runs mixture-of-experts language models that are larger than the GPU's memory, straight from GGUF files.

>>> from moe_engine import Engine
>>> with Engine.load() as engine:  # no path: the small bundled model
...     print(engine.generate("Once upon a time", max_tokens=64).text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_engine.config import EngineConfig, SamplingParams
    from moe_engine.engine import Engine
    from moe_engine.errors import (
        CalibrationError,
        CapacityError,
        ConfigError,
        DecodeError,
        ModelFormatError,
        MoeEngineError,
        NativeLibraryError,
        TraceFormatError,
        UnsupportedModelError,
    )
    from moe_engine.generation import Generation, Result
    from moe_engine.gguf_file import GGUFFile
    from moe_engine.stats import Stats
    from moe_engine.tokenizer import Tokenizer

__version__ = "0.1.0"

# Where each public name lives; loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "CalibrationError": "errors",
    "CapacityError": "errors",
    "ConfigError": "errors",
    "DecodeError": "errors",
    "Engine": "engine",
    "EngineConfig": "config",
    "GGUFFile": "gguf_file",
    "Generation": "generation",
    "ModelFormatError": "errors",
    "MoeEngineError": "errors",
    "NativeLibraryError": "errors",
    "Result": "generation",
    "SamplingParams": "config",
    "Stats": "stats",
    "Tokenizer": "tokenizer",
    "TraceFormatError": "errors",
    "UnsupportedModelError": "errors",
}

__all__ = [
    "CalibrationError",
    "CapacityError",
    "ConfigError",
    "DecodeError",
    "Engine",
    "EngineConfig",
    "GGUFFile",
    "Generation",
    "ModelFormatError",
    "MoeEngineError",
    "NativeLibraryError",
    "Result",
    "SamplingParams",
    "Stats",
    "Tokenizer",
    "TraceFormatError",
    "UnsupportedModelError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_engine' has no attribute '{name}'")
    return getattr(import_module(f"moe_engine.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
