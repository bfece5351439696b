"""Least recently used."""

from moe_engine.policies.base import Key
from moe_engine.policies.ranked import Ranked


class LRU(Ranked[Key]):
    """Evicts the key whose last use is longest ago.

    Not `cachetools.LRUCache`: that one shows its oldest key only by giving it up, so pinned keys would lose their
    places.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, rank=lambda _: 0)

    def note(self, key: Key, step: int, weight: float) -> None:
        return

    def prefers(self, key: Key, other: Key) -> bool:
        return True
