"""Least frequently used."""

from collections import Counter

from moe_engine.policies.base import Key
from moe_engine.policies.ranked import Ranked


class LFU(Ranked[Key]):
    """Evicts the key with the fewest uses since the beginning, in the cache or out of it.

    Not `cachetools.LFUCache`: that one can neither pass over a pinned key without forgetting its count, nor count
    uses of absent keys.
    """

    def __init__(self, capacity: int) -> None:
        self._uses: Counter[Key] = Counter()
        super().__init__(capacity, rank=self._uses.__getitem__)

    def note(self, key: Key, step: int, weight: float) -> None:
        self._uses[key] += 1
