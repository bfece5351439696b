"""The common part of policies that give every key a rank."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

from moe_engine.policies.base import Key, Resident


class Ranked(Resident[Key]):
    """Evicts the key of the lowest rank; among equals the one whose last use is longest ago.

    A victim is found by looking at all residents: a pool has at most some hundred.
    """

    def __init__(self, capacity: int, rank: Callable[[Key], Any]) -> None:
        """`rank` gives something to compare resident keys by."""
        self._resident: OrderedDict[Key, None] = OrderedDict()  # oldest use first
        super().__init__(capacity, self._resident)
        self._rank = rank

    @abstractmethod
    def note(self, key: Key, step: int, weight: float) -> None:
        """Learns from a use of any key."""

    def touch(self, key: Key, step: int = 0, weight: float = 1.0) -> None:
        if key in self._resident:
            self._resident.move_to_end(key)
        self.note(key, step, weight)

    def candidate(self, pinned: Collection[Key]) -> Key | None:
        return min([key for key in self._resident if key not in pinned], key=self._rank, default=None)

    def prefers(self, key: Key, other: Key) -> bool:
        return bool(self._rank(key) > self._rank(other))
