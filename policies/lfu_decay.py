"""Least frequently used of late."""

from moe_engine.policies.base import Key
from moe_engine.policies.decayed_sum import DecayedSum
from moe_engine.policies.ranked import Ranked


class DecayedLFU(Ranked[Key]):
    """Evicts the key with the fewest uses, where a use counts half after `half_life` tokens."""

    def __init__(self, capacity: int, half_life: float) -> None:
        self._uses = DecayedSum[Key](half_life)
        super().__init__(capacity, rank=self._uses.order)

    def note(self, key: Key, step: int, weight: float) -> None:
        self._uses.add(key, step)
