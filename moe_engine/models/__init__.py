"""One file per family, named after its `general.architecture`; each holds a class `Model`.

To add a family, add a file: nothing else lists them.
"""

from importlib import import_module
from pathlib import Path

from moe_engine.errors import UnsupportedModelError
from moe_engine.model import Transformer


def supported_architectures() -> list[str]:
    """Architecture names this version runs."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def model_class(architecture: str, source: str) -> type[Transformer]:
    """The class of a file's architecture. Raises `UnsupportedModelError` naming the known ones."""
    known = supported_architectures()
    if architecture not in known:
        raise UnsupportedModelError(
            f"{source}: architecture '{architecture}' is not supported, expected one of: {', '.join(known)}"
        )
    model: type[Transformer] = import_module(f"moe_engine.models.{architecture}").Model
    return model
