"""Sums whose terms lose half their value every `half_life` tokens."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Generic

from moe_engine.policies.base import Key


class DecayedSum(Generic[Key]):
    """One sum per key, kept as log2(sum) + step / half_life: that does not change while nothing is added, so that
    the order of keys can be read off without bringing all of them up to date."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._log: defaultdict[Key, float] = defaultdict(lambda: -math.inf)
        self.order: Callable[[Key], float] = self._log.__getitem__  # larger for a larger sum

    def add(self, key: Key, step: int, amount: float = 1.0) -> None:
        """Adds `amount` (> 0; others are ignored) in token number `step`."""
        if not amount > 0:
            return
        new, old = math.log2(amount) + step / self._half_life, self._log[key]
        high, low = (new, old) if new > old else (old, new)
        self._log[key] = high + math.log2(1 + 2 ** (low - high))

    def log2_at(self, key: Key, step: int) -> float:
        """log2 of the sum in token number `step`; -inf if nothing was added."""
        return self.order(key) - step / self._half_life
