"""Least recently used."""

from collections.abc import Collection
from typing import Generic

from cachetools import LRUCache

from moe_engine.policies.base import Key


class LRU(Generic[Key]):
    """Evicts the key whose last use is longest ago. At most `capacity` keys."""

    def __init__(self, capacity: int) -> None:
        self._order: LRUCache[Key, None] = LRUCache(maxsize=capacity)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def insert(self, key: Key) -> None:
        assert key not in self._order
        assert len(self._order) < self._order.maxsize
        self._order[key] = None

    def touch(self, key: Key) -> None:
        self._order[key]  # reading an LRUCache entry makes it the most recent

    def victim(self, pinned: Collection[Key]) -> Key | None:
        """As `Policy.victim`; pinned keys met on the way count as used now."""
        passed: list[Key] = []
        found: Key | None = None
        while self._order and found is None:
            key, _ = self._order.popitem()
            if key in pinned:
                passed.append(key)
            else:
                found = key
        for key in passed:
            self._order[key] = None
        return found
