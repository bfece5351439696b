"""What the recorded predictions of the next two layers' choices are worth to the cache, without times.

    python bench/bench_foreseen.py

Replays data/routing.npz (12 layers, 64 experts, top 8, trained) in one pool for all layers, in some minutes. "kept":
what the next two layers will probably choose is not evicted. "one copy": besides, each layer copies one expert that is
predicted of the next layer and absent, the likeliest, before that layer comes, as where copies take as long as a layer.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_engine.config import DEFAULT_POLICY
from moe_engine.policies.registry import Pool, policy_of
from moe_engine.simulator import simulate
from moe_engine.trace_npz import import_npz

ROUTING = Path(__file__).parent / "data" / "routing.npz"
SHARES = (0.25, 0.5)
WAYS = {"": (False, False), "kept": (True, False), "kept, one copy": (True, True)}


def hit_rate(
    name: str, ids: NDArray[np.int64], ahead: NDArray[np.int64], n_expert: int, n_slot: int, way: str
) -> float:
    """ids `[n_token, n_layer, top_k]`; ahead `[2, n_token, n_layer, top_k]`: what was predicted, -1 for nothing."""
    keeps, copies = WAYS[way]
    n_token, n_layer, _ = ids.shape
    policy, admission = policy_of(name).build(Pool(n_slot, n_layer, n_expert))
    hits = 0
    for token in range(n_token):
        for layer in range(n_layer):
            served = (layer * n_expert + ids[token, layer]).tolist()
            after = range(layer + 1, min(layer + 1 + len(ahead), n_layer))
            foreseen = [
                [next_layer * n_expert + e for e in ahead[next_layer - layer - 1, token, next_layer].tolist() if e >= 0]
                for next_layer in after
            ]
            pinned = set(served).union(*foreseen) if keeps else set(served)
            for key in admission.order(served):
                hit = key in policy
                policy.touch(key, token)
                admission.note(key, token)
                hits += hit
                if hit:
                    continue
                if len(policy) < n_slot:
                    policy.insert(key)
                elif (victim := policy.candidate(pinned)) is not None and admission.admits(key, victim):
                    policy.remove(victim)
                    policy.insert(key)
            absent = [key for key in foreseen[0] if key not in policy] if copies and foreseen else []
            if absent and len(policy) == n_slot and policy.victim(pinned) is not None:
                policy.insert(absent[0])
    return hits / ids.size


def main() -> None:
    trace = import_npz(ROUTING)
    with np.load(ROUTING, allow_pickle=False) as archive:
        ids, ahead = (archive[name].astype(np.int64) for name in ("ids", "ahead"))
    n_expert = trace.model.n_expert
    for share in SHARES:
        capacity = int(share * n_expert)
        lru, best = (
            sum(outcome.hits) / sum(outcome.accesses)
            for outcome in simulate(trace, ["lru", "belady-bypass"], [capacity], shared=True)
        )
        print(f"{share:.0%} of the experts: LRU {lru:.1%}, Belady with bypass {best:.1%}")
        for name in ("lru", DEFAULT_POLICY):
            for way in WAYS:
                found = hit_rate(name, ids, ahead, n_expert, capacity * trace.model.n_layer, way)
                closed = (found - lru) / (best - lru)
                print(f"  {name:22} {way:15} {found:.1%}, {closed:.0%} of the way from LRU to Belady", flush=True)


if __name__ == "__main__":
    main()
