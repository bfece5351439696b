"""The native twins of the policies in `policies/`: for the decode worker, and to replay traces quickly."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe_engine.kernels import _cpu
from moe_engine.policies.registry import PolicySpec, require_native

FORESEEING = ("belady", "belady-bypass")  # in `replay` only


def native_policy(spec: PolicySpec) -> _cpu.PolicySettings:
    """What the native side builds the policy from. Raises ConfigError if it has no twin."""
    require_native(spec)
    return _settings(spec)


def _settings(spec: PolicySpec) -> _cpu.PolicySettings:
    return _cpu.PolicySettings(spec.name, spec.admit, {**spec.values, "floor": float(spec.floor)})


def replay(
    spec: PolicySpec, ids: NDArray[np.int32], layers: range, n_layer: int, n_expert: int, n_slot: int,
    residents: Sequence[int] = (),
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:  # fmt: skip
    """Hits, and misses that were given a slot, int32 `[n_token, len(layers)]` each, of one pool of `n_slot` slots for
    the experts of `layers`, of n_layer in all.

    ids int32 `[n_token, len(layers), top_k]`, distinct in a layer and below n_expert. residents: keys (layer *
    n_expert + expert) that are in the pool at first, in the order of their insertion.
    """
    n_token, n, top_k = ids.shape
    assert (n, layers.step) == (len(layers), 1)
    assert 0 <= layers.start < layers.stop <= n_layer
    assert len(residents) <= n_slot
    ids = np.ascontiguousarray(ids)
    assert ids.dtype == np.int32
    assert not ids.size or (ids.min() >= 0 and ids.max() < n_expert)
    unbound = spec.name == "belady-bypass"
    if unbound:  # which brings its own rule: what is needed before the victim is
        native = _cpu.PolicySettings("belady", "outranks", {})
    elif spec.name == "belady":
        native = _settings(spec)
    else:
        native = native_policy(spec)
    hits, fetched = (np.empty((n_token, n), np.int32) for _ in range(2))
    sizes = (n_token, n, top_k, layers.start, n_layer, n_expert, n_slot)
    _cpu.replay(native, ids.ctypes.data, *sizes, list(residents), unbound, hits.ctypes.data, fetched.ctypes.data)
    return hits, fetched
