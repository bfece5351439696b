"""The common part of policies that a cache of `cachetools` orders."""

from collections.abc import Collection
from copy import copy

from cachetools import Cache

from moe_engine.policies.base import Key, Resident


class OnCachetools(Resident[Key]):
    """Evicts in the order in which a `cachetools` cache pops its items, but passes over pinned keys."""

    def __init__(self, resident: Cache[Key, None]) -> None:
        """resident: empty, with room for at least one key."""
        super().__init__(resident.maxsize, resident)

    def touch(self, key: Key, step: int = 0, weight: float = 1.0) -> None:
        self._resident.get(key)

    def candidate(self, pinned: Collection[Key]) -> Key | None:
        order = copy(self._resident)  # popping is the only look at the order, and pinned keys must keep their places
        while order:
            key: Key = order.popitem()[0]
            if key not in pinned:
                return key
        return None
