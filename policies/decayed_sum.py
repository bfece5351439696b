"""Sums whose terms lose half their value every `half_life` tokens."""

import math
from collections import defaultdict
from typing import Generic

from moe_engine.policies.base import Key

_LARGEST = 512  # sums are scaled down before their terms reach two to this


class DecayedSum(Generic[Key]):
    """One sum per key, in a unit that shrinks as time goes on: so nothing changes but what is added to, and the order
    of keys can be read off without bringing all of them up to date. What is a thousand half-lives old is forgotten."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._base = 0.0
        self._sums: defaultdict[Key, float] = defaultdict(float)

    def add(self, key: Key, step: int, amount: float = 1.0) -> None:
        """Adds `amount` in token number `step`."""
        exponent = step / self._half_life - self._base
        if exponent > _LARGEST:
            shift = float(math.floor(exponent))
            self._base += shift
            exponent -= shift
            for other in self._sums:
                self._sums[other] *= math.exp2(-shift)
        self._sums[key] += amount * math.exp2(exponent)

    def order(self, key: Key) -> float:
        """Larger for a larger sum, at any one time."""
        return self._sums[key]

    def unit(self, step: int) -> float:
        """What to multiply `order` with for the sum in token number `step`."""
        return math.exp2(min(self._base - step / self._half_life, 2.0 * _LARGEST - 1))
