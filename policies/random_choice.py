"""Random replacement: what a policy has to beat."""

import random

from moe_engine.policies.base import Key
from moe_engine.policies.ranked import Ranked


class RandomChoice(Ranked[Key]):
    """Evicts any key with equal probability; the same `seed` and uses give the same victims."""

    def __init__(self, capacity: int, seed: int) -> None:
        draw = random.Random(seed).random
        super().__init__(capacity, rank=lambda _: draw())

    def note(self, key: Key, step: int, weight: float) -> None:
        return
