"""Recorded routing for a model of another shape, to follow in place of its router's choices."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_engine.errors import ConfigError
from moe_engine.trace_npz import import_npz
from moe_engine.traces import Trace

LATER = 640  # tokens by which a recorded layer is shifted when it is used again


def load_trace(path: Path) -> Trace:
    """A trace file, or an archive with an array 'ids'. Raises `TraceFormatError`."""
    return import_npz(path) if path.suffix == ".npz" else Trace.load(path)


def replayed(trace: Trace, n_layer: int, n_expert: int, top_k: int) -> Tensor:
    """A trace's choices mapped onto a model: int32 `[n_step, n_layer, top_k]`, for `DecodeStep.replay`.

    A model with g times as many experts joins g recorded layers, one choice in g from each, so that the share of
    experts in use and their locality stay those of the recording. Layers beyond the recorded ones repeat them some
    hundreds of tokens later. Raises `ConfigError` if the shapes do not go together.
    """
    recorded = trace.model
    groups = n_expert // recorded.n_expert
    if groups < 1 or n_expert % recorded.n_expert or top_k > recorded.top_k:
        raise ConfigError(
            f"the trace has {recorded.top_k} of {recorded.n_expert} experts, which cannot stand for the model's "
            f"{top_k} of {n_expert}: expected at least as many choices, and a divisor of its experts"
        )
    ids = trace.ids.astype(np.int32)
    layers = []
    for layer in range(n_layer):
        later = np.roll(ids, -(layer // recorded.n_layer) * LATER, axis=0)
        joined = np.empty_like(ids[:, 0])
        for group in range(groups):
            source = later[:, (layer + 5 * group) % recorded.n_layer]
            joined[:, group::groups] = source[:, group::groups] + group * recorded.n_expert
        layers.append(joined[:, :top_k])
    return torch.from_numpy(np.stack(layers, axis=1))
