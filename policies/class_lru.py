"""LRU within classes of use."""

import math

from moe_engine.policies.base import Key
from moe_engine.policies.decayed_sum import DecayedSum
from moe_engine.policies.ranked import Ranked


class ClassLRU(Ranked[Key]):
    """Evicts the least recently used key of the lowest class; the class is floor(log2(decayed uses)), at least 0.

    So what is used twice as often goes later, and small differences in frequency do not matter.
    """

    def __init__(self, capacity: int, half_life: float) -> None:
        super().__init__(capacity, rank=self._class)
        self._uses = DecayedSum[Key](half_life)
        self._step = 0

    def note(self, key: Key, step: int, weight: float) -> None:
        self._uses.add(key, step)
        self._step = step

    def _class(self, key: Key) -> int:
        return math.floor(max(0.0, self._uses.log2_at(key, self._step)))
