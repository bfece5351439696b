"""Least router weight of late."""

from moe_engine.policies.base import Key
from moe_engine.policies.decayed_sum import DecayedSum
from moe_engine.policies.ranked import Ranked


class RouterWeight(Ranked[Key]):
    """Evicts the key with the smallest sum of router weights, where a weight counts half after `half_life` tokens."""

    def __init__(self, capacity: int, half_life: float) -> None:
        self._weights = DecayedSum[Key](half_life)
        super().__init__(capacity, rank=self._weights.order)

    def note(self, key: Key, step: int, weight: float) -> None:
        self._weights.add(key, step, weight)
