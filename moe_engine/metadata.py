"""Typed, checked access to a model's metadata keys."""

from collections.abc import Mapping
from typing import Any

from moe_engine.errors import ModelFormatError

_LARGEST = 1 << 31
MAX_EXPERTS = 1 << 16


class Metadata:
    """The keys of one architecture: `integer("block_count")` reads `<architecture>.block_count`.

    Every getter raises `ModelFormatError` naming the file, the key, what was found and what was expected.
    """

    def __init__(self, values: Mapping[str, Any], architecture: str, source: str) -> None:
        self.values, self.architecture, self.source = values, architecture, source

    def fail(self, key: str, expected: str) -> ModelFormatError:
        full = f"{self.architecture}.{key}"
        found = f"is {self.values[full]!r}" if full in self.values else "is missing"
        return ModelFormatError(f"{self.source}: key '{full}' {found}, expected {expected}")

    def _get(self, key: str) -> Any:
        return self.values.get(f"{self.architecture}.{key}")

    def has(self, key: str) -> bool:
        return self._get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = _LARGEST) -> int:
        """An integer in `[low, high]`; a per-layer array counts if all its entries are equal."""
        value = self._get(key)
        if isinstance(value, list) and value and len(set(map(repr, value))) == 1:
            value = value[0]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e30) -> float:
        """A finite number in `[low, high]`."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.fail(key, f"a number from {low} to {high}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value
