"""LRU within classes of use."""

import math

from moe_engine.policies.base import Key
from moe_engine.policies.decayed_sum import DecayedSum
from moe_engine.policies.ranked import Ranked


class ClassLRU(Ranked[Key]):
    """Evicts the least recently used key of the lowest class; classes are powers of two of the decayed uses.

    So what is used twice as often goes later, and small differences in frequency do not matter. A key changes its class
    only when it is used: all decay at the same rate, so the classes move with them.
    """

    def __init__(self, capacity: int, half_life: float) -> None:
        super().__init__(capacity, rank=self._class)
        self._uses = DecayedSum[Key](half_life)

    def note(self, key: Key, step: int, weight: float) -> None:
        self._uses.add(key, step)

    def _class(self, key: Key) -> float:
        uses = self._uses.order(key)
        return math.frexp(uses)[1] if uses > 0 else -math.inf
