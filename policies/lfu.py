"""Least frequently used."""

from collections import Counter

from cachetools import LFUCache

from moe_engine.policies.base import Key
from moe_engine.policies.on_cachetools import OnCachetools


class LFU(OnCachetools[Key]):
    """Evicts the key with the fewest uses since the beginning, in the cache or out of it; among equals the one whose
    last use is longest ago."""

    def __init__(self, capacity: int) -> None:
        super().__init__(LFUCache(capacity))
        self._uses = Counter[Key]()

    def insert(self, key: Key) -> None:
        super().insert(key)
        for _ in range(self._uses[key]):  # which the cache has not seen, or has forgotten
            super().touch(key)

    def touch(self, key: Key, step: int = 0, weight: float = 1.0) -> None:
        self._uses[key] += 1
        super().touch(key)

    def prefers(self, key: Key, other: Key) -> bool:
        return self._uses[key] > self._uses[other]
