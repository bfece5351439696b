"""The common part of policies that a cache of `cachetools` orders."""

from collections.abc import Collection
from copy import copy

from cachetools import Cache

from moe_engine.policies.base import Key, Policy


class OnCachetools(Policy[Key]):
    """Evicts in the order in which a `cachetools` cache pops its items, but passes over pinned keys."""

    def __init__(self, resident: Cache[Key, None]) -> None:
        """resident: an empty cache, of at least one key; it holds the resident keys, its values mean nothing."""
        self._resident = resident

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, key: object) -> bool:
        return key in self._resident

    def insert(self, key: Key) -> None:
        assert key not in self._resident
        assert len(self._resident) < self._resident.maxsize
        self._resident[key] = None

    def touch(self, key: Key, step: int = 0, weight: float = 1.0) -> None:
        self._resident.get(key)

    def candidate(self, pinned: Collection[Key]) -> Key | None:
        order = copy(self._resident)  # popping is the only look at the order, and pinned keys must keep their places
        while order:
            key: Key = order.popitem()[0]
            if key not in pinned:
                return key
        return None

    def remove(self, key: Key) -> None:
        del self._resident[key]
