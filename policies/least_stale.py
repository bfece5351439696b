"""Least-stale: who is needed latest, given that layers take turns."""

from moe_engine.policies.ranked import Ranked


class LeastStale(Ranked[int]):
    """For a pool that layers share. Keys are layer * n_expert + expert; layers take turns in order, over and over.

    LRU over such a pool evicts what the next layers used one token ago, just before they ask for it again. Here the
    age of a key is counted in turns of its own layer since its last use. The oldest goes; of equally old ones the one
    whose layer has its turn latest, that is, was served last. In a pool of one layer this is LRU.

    From the eviction policy Least-Stale of Hoang et al., "SpecMD" (arXiv:2602.03921), which evicts experts of earlier
    passes before those of the running pass; this is our reading of its idea, with ages instead of two classes.
    """

    def __init__(self, capacity: int, n_layer: int, n_expert: int) -> None:
        super().__init__(capacity, rank=self._freshness)
        self._n_layer, self._n_expert = n_layer, n_expert
        self._turn = [-1] * n_layer  # the token that each layer served last
        self._last_use: dict[int, int] = {}
        self._layer = 0

    def note(self, key: int, step: int, weight: float) -> None:
        self._layer = key // self._n_expert
        self._turn[self._layer] = self._last_use[key] = step

    def _freshness(self, key: int) -> tuple[int, int]:
        layer = key // self._n_expert
        age = self._turn[layer] - self._last_use.get(key, -1)
        turns_until = (layer - self._layer - 1) % self._n_layer
        return -age, -turns_until
