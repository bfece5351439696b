"""How often experts would be found in VRAM, and how many a prompt uses: estimated from a recorded trace."""

from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_engine.errors import ConfigError
from moe_engine.stack_distance import lru_distances
from moe_engine.trace_npz import import_npz
from moe_engine.traces import Trace

LONGEST = 4096  # tokens of a trace that are looked at: the last ones


@dataclass(frozen=True)
class Found:
    """Of decode steps: the share of choices that hit, and of layers in which at least one misses."""

    hit_rate: float
    missed_layers: float
    misses: float  # distinct experts of a layer and step that are in no slot


class RoutingEstimate:
    """From a trace of the model itself, or of another one, whose skew then stands for that of any.

    The cache is taken to be LRU, with slots shared out evenly among layers. The first half of the trace warms it up.
    """

    def __init__(self, trace: Trace, n_sequence: int = 1) -> None:
        """n_sequence: sequences that decode together, each from another part of the trace."""
        model = trace.model
        n_step = min(trace.n_token, LONGEST) // n_sequence
        if n_step < 2:
            raise ConfigError(f"the trace has {trace.n_token} tokens: expected at least {2 * n_sequence}")
        self.n_expert, self.top_k, self.n_sequence = model.n_expert, model.top_k, n_sequence
        # [n_step, n_sequence, n_layer, top_k]
        ids = trace.ids[-n_step * n_sequence :].reshape(n_sequence, n_step, model.n_layer, model.top_k)
        self._ids = ids.swapaxes(0, 1)

    @cached_property
    def _distances(self) -> NDArray[np.int32]:
        """LRU stack distances, [n_step, n_sequence, n_layer, top_k], of the second half."""
        flat = self._ids.reshape(-1, *self._ids.shape[2:])
        distances = lru_distances(flat, self.n_expert).reshape(self._ids.shape)
        return distances[len(distances) // 2 :]

    def found(self, share: float) -> Found:
        """With slots for this share of the experts."""
        if share <= 0:
            missed = self._missed(0)
            return Found(0.0, 1.0, missed.misses)
        if share >= 1:
            return Found(1.0, 0.0, 0.0)
        slots = share * self.n_expert
        low, high = self._missed(int(slots)), self._missed(int(slots) + 1)
        part = slots - int(slots)  # capacities between whole ones
        mixed = (a + part * (b - a) for a, b in zip(vars(low).values(), vars(high).values(), strict=True))
        return Found(*mixed)

    def _missed(self, slots: int) -> Found:
        missed = self._distances >= slots
        hit_rate = 1.0 - float(missed.mean())
        # A sequence that finds what another one of the same step has missed counts as a hit, and is read once.
        by_layer = missed.sum(axis=(1, 3))
        return Found(hit_rate, float((by_layer > 0).mean()), float(by_layer.mean()))

    @cached_property
    def _popularity(self) -> NDArray[np.float64]:
        """Share of the tokens that choose an expert, most popular first; mean of the layers."""
        n_token = self._ids.shape[0] * self._ids.shape[1]
        layers = self._ids.reshape(-1, *self._ids.shape[2:]).swapaxes(0, 1)
        uses = [np.sort(np.bincount(layer.ravel(), minlength=self.n_expert))[::-1] for layer in layers]
        mean: NDArray[np.float64] = np.mean(uses, axis=0) / n_token
        return mean

    def counts(self, n_token: int, n_expert: int, top_k: int) -> list[int]:
        """Tokens of each expert that has some, most popular first, for `n_token` tokens of a prompt."""
        middle = (np.arange(n_expert) + 0.5) / n_expert * self.n_expert - 0.5
        share = np.interp(middle, np.arange(self.n_expert), self._popularity)
        share = np.minimum(share * top_k / share.sum(), 1.0)
        n_used = int(np.clip(round(float((1 - (1 - share) ** n_token).sum())), min(top_k, n_expert), n_expert))
        used = share[:n_used] * (n_token * top_k / share[:n_used].sum())
        return [int(n) for n in np.clip(np.round(used), 1, n_token)]


def bundled_trace() -> Trace:
    """A recording of a small trained model: 64 experts, 8 of them a token, on five kinds of text."""
    return import_npz(Path(str(files("moe_engine") / "data" / "routing.npz")))


def estimate(trace: Trace | None, n_expert: int, top_k: int, n_sequence: int) -> RoutingEstimate:
    """Raises `ConfigError` if a given trace is of a model with other experts."""
    if trace is None:
        return RoutingEstimate(bundled_trace(), n_sequence)
    if (trace.model.n_expert, trace.model.top_k) != (n_expert, top_k):
        raise ConfigError(
            f"the trace is of a model with {trace.model.n_expert} experts, {trace.model.top_k} a token, but the file "
            f"has {n_expert} and {top_k}"
        )
    return RoutingEstimate(trace, n_sequence)
