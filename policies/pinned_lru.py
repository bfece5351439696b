"""A fixed hot set, and LRU for the rest."""

from collections.abc import Collection

from moe_engine.policies.base import Key, Policy
from moe_engine.policies.lru import LRU


class PinnedLRU(Policy[Key]):
    """Keys of `hot`, the most used ones of a profile, never leave once they are in; the others are ordered by LRU."""

    def __init__(self, capacity: int, hot: Collection[Key]) -> None:
        self._capacity = capacity
        self._hot = frozenset(hot)
        self._resident_hot: set[Key] = set()
        self._others = LRU[Key](capacity)

    def __len__(self) -> int:
        return len(self._resident_hot) + len(self._others)

    def __contains__(self, key: object) -> bool:
        return key in self._resident_hot or key in self._others

    def insert(self, key: Key) -> None:
        assert len(self) < self._capacity
        if key in self._hot:
            assert key not in self._resident_hot
            self._resident_hot.add(key)
        else:
            self._others.insert(key)

    def touch(self, key: Key, step: int = 0, weight: float = 1.0) -> None:
        self._others.touch(key)

    def candidate(self, pinned: Collection[Key]) -> Key | None:
        return self._others.candidate(pinned)

    def remove(self, key: Key) -> None:
        if key in self._resident_hot:
            self._resident_hot.remove(key)
        else:
            self._others.remove(key)
