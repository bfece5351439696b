"""Least recently used."""

from cachetools import LRUCache

from moe_engine.policies.base import Key
from moe_engine.policies.on_cachetools import OnCachetools


class LRU(OnCachetools[Key]):
    """Evicts the key whose last use is longest ago."""

    def __init__(self, capacity: int) -> None:
        super().__init__(LRUCache(capacity))
