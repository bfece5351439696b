"""Used often of late, and just now: a blend of two rates of use."""

import math

from moe_engine.policies.decayed_sum import DecayedSum
from moe_engine.policies.ranked import Ranked


class Blend(Ranked[int]):
    """Evicts the key with the smallest blend of two mean rates of use: `share` of a mean over about `fast` tokens, the
    rest over about `half_life`. Keys are layer * n_expert + expert.

    A router that chose an expert chooses it again in the next tokens more often than its rate says; the short mean is
    for that. Means are as of a key's layer's last turn, so that layers that wait for theirs do not look idle.
    """

    def __init__(
        self,
        capacity: int,
        n_layer: int,
        n_expert: int,
        *,
        half_life: float,
        fast: float,
        share: float,
        margin: float,
    ) -> None:
        """margin: a key is preferred to another one if its rate is this many times as high. A little more than the same
        seldom pays for a copy."""
        super().__init__(capacity, rank=self._rate)
        self._margin = margin
        self._n_expert = n_expert
        self._turn = [-1] * n_layer  # the token that each layer served last
        self._slow, self._fast = DecayedSum[int](half_life), DecayedSum[int](fast)
        self._slow_scale = (1 - share) * (1 - math.exp2(-1 / half_life))
        self._fast_scale = share * (1 - math.exp2(-1 / fast))

    def prefers(self, key: int, other: int) -> bool:
        return self._rate(key) > self._margin * self._rate(other)

    def note(self, key: int, step: int, weight: float) -> None:
        self._turn[key // self._n_expert] = step
        self._slow.add(key, step)
        self._fast.add(key, step)

    def _rate(self, key: int) -> float:
        turn = self._turn[key // self._n_expert]
        fast = self._fast_scale * self._fast.unit(turn) * self._fast.order(key)
        return fast + self._slow_scale * self._slow.unit(turn) * self._slow.order(key)
