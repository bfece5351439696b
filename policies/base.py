"""What a replacement policy and an admission rule must offer."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, MutableMapping, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Policy(ABC, Generic[Key]):
    """Orders the resident keys. It neither knows nor cares what a key stands for, unless it says so.

    For every use the cache calls `touch`, whether the key is resident or not. When it has loaded a key it calls
    `insert`; when it needs room, `victim`, or `candidate` and then perhaps `remove`.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def insert(self, key: Key) -> None:
        """Adds a key that is not resident; there must be room."""

    @abstractmethod
    def touch(self, key: Key, step: int = 0, weight: float = 1.0) -> None:
        """Notes a use, in token number `step`, with the router's `weight`. Policies with a history learn from absent
        keys too."""

    @abstractmethod
    def candidate(self, pinned: Collection[Key]) -> Key | None:
        """The resident key to evict next, never one of `pinned`; None if all are pinned."""

    @abstractmethod
    def remove(self, key: Key) -> None:
        """Removes a resident key."""

    def prefers(self, key: Key, other: Key) -> bool:
        """Whether `key`, just used, should rather be resident than `other`; yes, for who orders by the last use."""
        return True

    def victim(self, pinned: Collection[Key]) -> Key | None:
        """Removes and returns the `candidate`."""
        key = self.candidate(pinned)
        if key is not None:
            self.remove(key)
        return key


class Resident(Policy[Key]):
    """The part that policies share which keep the resident keys in a mapping."""

    def __init__(self, capacity: float, resident: MutableMapping[Key, None]) -> None:
        """resident: empty; its values mean nothing."""
        self._capacity, self._resident = capacity, resident

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, key: object) -> bool:
        return key in self._resident

    def insert(self, key: Key) -> None:
        assert key not in self._resident
        assert len(self._resident) < self._capacity
        self._resident[key] = None

    def remove(self, key: Key) -> None:
        del self._resident[key]


class Admission(ABC, Generic[Key]):
    """Says whether a missed key is worth evicting another one for. A free slot is always filled."""

    def note(self, key: Key, step: int) -> None:
        """Notes a use in token number `step`, hit or miss, before `admits` is asked about it."""
        return

    def order(self, keys: Sequence[Key]) -> Sequence[Key]:
        """The order in which the keys of one step, not noted yet, are served."""
        return keys

    @abstractmethod
    def admits(self, key: Key, victim: Key) -> bool: ...
