"""Replays cache policies over a trace: what would have been hit.

What is simulated:

- One access per (token, MoE layer, chosen expert), in decode order, best expert first. Tokens of prompts are replayed
  like any other; the cache outlives the sequences.
- Every layer has a pool of its own; or, shared, all layers have one of n_layer times the size.
- The experts of the step being served (one token in one layer) are not evicted; only `BOUND` may do so.
- Pools start empty; warm, with as many of the first experts as fit, the first counting as used last.
- A miss takes a free slot, else the slot of the policy's victim, unless admission refuses.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_engine.config import parse_size
from moe_engine.errors import ConfigError
from moe_engine.kernels.policy import FORESEEING, replay
from moe_engine.policies.base import Admission, Policy
from moe_engine.policies.registry import NATIVE, PolicySpec, Pool, policy_of
from moe_engine.stack_distance import lru_distances
from moe_engine.traces import Trace

BOUND = "belady-bypass"  # no policy has more hits
Counts = NDArray[np.integer]


@dataclass(frozen=True)
class Outcome:
    """What one policy did at one capacity, which is in experts per layer. Tuples are by layer."""

    policy: str
    capacity: int
    hits: tuple[int, ...]
    accesses: tuple[int, ...]
    missed_steps: tuple[int, ...]  # tokens that missed at least one expert
    fetched: int  # misses that were given a slot, all layers
    n_token: int
    bound: int  # hits of `BOUND`, all layers
    expert_bytes: tuple[int, ...] | None = None

    @property
    def hit_rate(self) -> float:
        return sum(self.hits) / max(1, sum(self.accesses))

    @property
    def to_belady(self) -> float:
        """By how much the bound's hit rate is higher."""
        return (self.bound - sum(self.hits)) / max(1, sum(self.accesses))

    @property
    def bytes(self) -> int | None:
        """Bytes of all misses: fetched, or computed elsewhere."""
        if self.expert_bytes is None:
            return None
        return sum((n - hits) * size for n, hits, size in zip(self.accesses, self.hits, self.expert_bytes, strict=True))

    def as_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "capacity": self.capacity,
            "hits": sum(self.hits),
            "accesses": sum(self.accesses),
            "fetched": self.fetched,
            "bytes": self.bytes,
            "hit_rate": self.hit_rate,
            "to_belady": self.to_belady,
            "hit_rate_per_layer": [hits / max(1, n) for hits, n in zip(self.hits, self.accesses, strict=True)],
        }


def capacity_of(text: str, n_expert: int, top_k: int, slot_bytes: int | None = None) -> int:
    """Experts per layer from "25%" (rounded down) or "32"; at least top_k. Raises ConfigError.

    slot_bytes: of a slot in every layer; where it is known, sizes such as "6GiB" are understood too.
    """
    if text.strip().endswith("B"):
        if slot_bytes is None:
            raise ConfigError(f"capacity is '{text}', but the size of an expert is not known: give it, or the model")
        return min(max(parse_size(text.strip()) // slot_bytes, top_k), n_expert)
    number = text.strip().removesuffix("%")
    if not number.isascii() or not number.replace(".", "", 1).isdigit() or (number == text.strip() and "." in number):
        raise ConfigError(f"capacity is '{text}', expected experts per layer such as 32, or a share such as 25%")
    is_share = text.strip().endswith("%")
    # A hundredth of a percent is exact in integers, a float product may fall just below one.
    slots = int(round(float(number) * 100) * n_expert // 10_000) if is_share else int(number)
    if not 0 < float(number) <= (100 if is_share else n_expert):
        raise ConfigError(f"capacity is '{text}', expected 1 to {n_expert} experts per layer, or up to 100%")
    return max(slots, top_k)


def simulate(
    trace: Trace,
    policies: Sequence[str | PolicySpec],
    capacities: Sequence[int],
    *,
    warm: bool = False,
    shared: bool = False,
    profile: Trace | None = None,
    expert_bytes: Sequence[int] | None = None,
) -> list[Outcome]:
    """One outcome per policy and capacity (experts per layer), in this order.

    `profile` is the earlier run that pinned-lru learns from. expert_bytes: of an expert of each layer. Raises
    ConfigError for unknown policies, capacities below top_k or a profile of another model.
    """
    specs = [policy_of(p) if isinstance(p, str) else p for p in policies]
    model = trace.model
    for capacity in capacities:
        if not model.top_k <= capacity <= model.n_expert:
            raise ConfigError(f"capacity is {capacity}, expected {model.top_k} (top_k) to {model.n_expert} experts")
    if profile is not None and (profile.model.n_layer, profile.model.n_expert) != (model.n_layer, model.n_expert):
        raise ConfigError("the profile is of a model with other layers or experts")
    replays = Replays(trace, warm, shared, profile)
    accesses = (trace.n_token * model.top_k,) * model.n_layer

    outcomes = []
    bounds: dict[int, int] = {}
    sizes = None if expert_bytes is None else tuple(expert_bytes)
    for spec in specs:
        for capacity in capacities:
            hits, fetched = replays.served(spec, capacity)
            if capacity not in bounds:
                best = hits if spec.name == BOUND else replays.served(policy_of(BOUND), capacity)[0]
                bounds[capacity] = int(best.sum())
            by_layer, missed = hits.sum(axis=0).tolist(), (hits < model.top_k).sum(axis=0).tolist()
            found = (tuple(by_layer), accesses, tuple(missed), int(fetched.sum()), trace.n_token, bounds[capacity])
            outcomes.append(Outcome(spec.text, capacity, *found, sizes))
    return outcomes


class Replays:
    """A trace as the streams of accesses that its pools see: one pool for all layers, or one each.

    native=False: by the classes of `policies` alone, which define what is right.
    """

    def __init__(
        self, trace: Trace, warm: bool, shared: bool, profile: Trace | None = None, *, native: bool = True
    ) -> None:
        self._native = native
        self._trace, self._warm, self._shared = trace, warm, shared
        self._keys = _keys(trace)
        self._profile = None if profile is None else Counter[int](_keys(profile).ravel().tolist())
        self._lru_distances: NDArray[np.int32] | None = None

    def served(self, spec: PolicySpec, capacity: int) -> tuple[Counts, Counts]:
        """Experts of each token that were hit, and that were missed and given a slot, `[n_token, n_layer]` each."""
        model = self._trace.model
        if self._native and (spec.name, spec.admit, spec.floor) == ("lru", "always", 0):
            hits = self._hits_of_lru(capacity)
            return hits, model.top_k - hits
        found = np.zeros((2, self._trace.n_token, model.n_layer), np.int32)
        for layers in self._pools():
            slots = capacity * len(layers)
            keys = (
                layers.start * model.n_expert + key for key in _by_expert(len(layers) * model.n_expert, model.n_expert)
            )
            residents = list(keys)[-slots:] if self._warm else []
            served = slice(layers.start, layers.stop)
            if self._native and spec.name in (*NATIVE, *FORESEEING):
                ids = self._trace.ids[:, served].astype(np.int32)
                found[:, :, served] = replay(spec, ids, layers, model.n_layer, model.n_expert, slots, residents)
            else:
                found[:, :, served] = self._plainly(spec, layers, slots, residents)
        return found[0], found[1]

    def _plainly(self, spec: PolicySpec, layers: range, slots: int, residents: Sequence[int]) -> Counts:
        """What `served` tells of one pool, `[2, n_token, len(layers)]`."""
        model, served = self._trace.model, slice(layers.start, layers.stop)
        keys = self._keys[:, served]
        uses = _times_of_use(keys) if spec.foresees else None
        policy, admission = spec.build(Pool(slots, model.n_layer, model.n_expert, uses, self._profile_of(layers)))
        for key in residents:
            policy.insert(key)
        weights = None if self._trace.weights is None else self._trace.weights[:, served]
        return _replay(keys, weights, policy, admission, slots)

    def _pools(self) -> list[range]:
        layers = range(self._trace.model.n_layer)
        return [layers] if self._shared else [range(layer, layer + 1) for layer in layers]

    def _profile_of(self, layers: Sequence[int]) -> Mapping[int, int] | None:
        if self._profile is None:
            return None
        return {key: n for key, n in self._profile.items() if key // self._trace.model.n_expert in layers}

    def _hits_of_lru(self, capacity: int) -> Counts:
        """From stack distances, which give all capacities at once."""
        model = self._trace.model
        n_pool = 1 if self._shared else model.n_layer
        slots = capacity * model.n_layer // n_pool
        if self._lru_distances is None:
            n_key = model.n_layer * model.n_expert // n_pool
            # In a pool of one layer, an expert is its own key.
            keys = self._keys if self._shared else self._trace.ids
            first = np.array(_by_expert(n_key, model.n_expert)) if self._warm else None
            streams = keys.reshape(-1, n_pool, model.top_k)
            self._lru_distances = lru_distances(streams, n_key, used_before=first).reshape(self._keys.shape)
        hits: Counts = (self._lru_distances < slots).sum(axis=2, dtype=np.int32)
        return hits


def _keys(trace: Trace) -> NDArray[np.int64]:
    """[n_token, n_layer, top_k]: layer * n_expert + expert."""
    layers = np.arange(trace.model.n_layer)[:, None]
    return layers * trace.model.n_expert + trace.ids.astype(np.int64)


def _by_expert(n_key: int, n_expert: int) -> list[int]:
    """The keys of a pool in the order in which a warm one was used: expert 0 of all its layers last."""
    return sorted(range(n_key), key=lambda key: key % n_expert, reverse=True)


def _times_of_use(keys: NDArray[np.int64]) -> dict[int, list[int]]:
    """For each key the numbers of the steps [n_token, n_layer] that use it, ascending."""
    flat = keys.ravel()
    order = flat.argsort(kind="stable")
    found, starts = np.unique(flat[order], return_index=True)
    steps = np.split(order // keys.shape[2], starts[1:])
    return {int(key): times.tolist() for key, times in zip(found, steps, strict=True)}


def _replay(
    keys: NDArray[np.int64], weights: NDArray[Any] | None, policy: Policy[int], admission: Admission[int], slots: int
) -> Counts:
    """Serves keys [n_token, n_layer, top_k] from one pool of `slots`; returns [2, n_token, n_layer]: hits, and misses
    that were given a slot."""
    n_token, n_layer, _ = keys.shape
    hits, fetched = found = np.zeros((2, n_token, n_layer), np.int32)
    weight_of = dict[int, float]()
    for token in range(n_token):
        rows = keys[token].tolist()  # one token at a time: Python's integers take much more room
        for layer, served in enumerate(rows):
            pinned = set(served)
            if weights is not None:
                weight_of = dict(zip(served, weights[token, layer].tolist(), strict=True))
            for key in admission.order(served):
                hit = key in policy
                policy.touch(key, token, weight_of.get(key, 1.0))
                admission.note(key, token)
                if hit:
                    hits[token, layer] += 1
                elif len(policy) < slots:
                    policy.insert(key)
                    fetched[token, layer] += 1
                else:
                    candidate = policy.candidate(pinned)
                    if candidate is not None and admission.admits(key, candidate):
                        policy.remove(candidate)
                        policy.insert(key)
                        fetched[token, layer] += 1
    return found
