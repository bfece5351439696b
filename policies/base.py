"""What a replacement policy must offer."""

from collections.abc import Collection, Hashable
from typing import Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Policy(Protocol[Key]):
    """Orders the resident keys. It neither knows nor cares what a key stands for.

    The cache calls `insert` for a key it has loaded, `touch` for every use of a resident key, and `victim` when
    it needs room.
    """

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...

    def insert(self, key: Key) -> None:
        """Adds a key that is not resident; there must be room."""
        ...

    def touch(self, key: Key) -> None:
        """Notes a use of a resident key."""
        ...

    def victim(self, pinned: Collection[Key]) -> Key | None:
        """Removes and returns the key to evict, never one of `pinned`; None if all are pinned."""
        ...
