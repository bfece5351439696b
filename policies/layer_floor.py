"""A pool that layers share, of which each of them keeps a part."""

from collections import defaultdict
from collections.abc import Collection

from moe_engine.policies.base import Policy


class LayerFloor(Policy[int]):
    """Lets a policy evict only from layers that hold more than `floor` keys, and from the one that is served.

    Where these have nothing to evict, the floor gives way. Keys are layer * n_expert + expert.
    """

    def __init__(self, policy: Policy[int], floor: int, n_expert: int) -> None:
        self._policy, self._floor, self._n_expert = policy, floor, n_expert
        self._held = defaultdict[int, set[int]](set)  # by layer
        self._served = 0  # the layer of the last use

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, key: object) -> bool:
        return key in self._policy

    def insert(self, key: int) -> None:
        self._policy.insert(key)
        self._held[key // self._n_expert].add(key)

    def touch(self, key: int, step: int = 0, weight: float = 1.0) -> None:
        self._served = key // self._n_expert
        self._policy.touch(key, step, weight)

    def candidate(self, pinned: Collection[int]) -> int | None:
        kept = set(pinned)
        for layer, keys in self._held.items():
            if layer != self._served and len(keys) <= self._floor:
                kept |= keys
        found = self._policy.candidate(kept)
        return self._policy.candidate(pinned) if found is None else found

    def remove(self, key: int) -> None:
        self._policy.remove(key)
        self._held[key // self._n_expert].remove(key)

    def prefers(self, key: int, other: int) -> bool:
        return self._policy.prefers(key, other)
