"""Least recently used."""

from collections.abc import Collection

from cachetools import LRUCache

from moe_engine.policies.base import Key, Policy


class LRU(Policy[Key]):
    """Evicts the key whose last use is longest ago. At most `capacity` keys."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._order: LRUCache[Key, None] = LRUCache(maxsize=capacity)
        self._oldest: list[Key] = []  # at most one: the candidate, which cachetools can only show by giving it up

    def __len__(self) -> int:
        return len(self._order) + len(self._oldest)

    def __contains__(self, key: object) -> bool:
        return key in self._order or key in self._oldest

    def insert(self, key: Key) -> None:
        assert key not in self
        assert len(self) < self._capacity
        self._order[key] = None

    def touch(self, key: Key, step: int = 0, weight: float = 1.0) -> None:
        if key in self._oldest:
            self._oldest.remove(key)
            self._order[key] = None
        elif key in self._order:
            self._order[key]  # reading an LRUCache entry makes it the most recent

    def candidate(self, pinned: Collection[Key]) -> Key | None:
        """As `Policy.candidate`; pinned keys met on the way count as used now."""
        passed: list[Key] = []
        found: Key | None = None
        while len(self) and found is None:
            key = self._oldest.pop() if self._oldest else self._order.popitem()[0]
            if key in pinned:
                passed.append(key)
            else:
                found = key
        for key in passed:
            self._order[key] = None
        if found is not None:
            self._oldest.append(found)
        return found

    def remove(self, key: Key) -> None:
        if key in self._oldest:
            self._oldest.remove(key)
        else:
            del self._order[key]
