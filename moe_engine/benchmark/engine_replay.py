"""What the simulator says of the slots that an engine has."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_engine.expert_cache import SlotPool
from moe_engine.kernels.policy import replay
from moe_engine.policies.registry import PolicySpec

IntArray = NDArray[np.int32]


def simulated_hits(
    pools: Iterable[SlotPool], residents: Sequence[Mapping[int, int]], policy: PolicySpec, ids: IntArray, n_expert: int
) -> IntArray:
    """Hits `[n_step, n_layer]` of steps that choose ids int32 `[n_step, n_layer, top_k]`, best first.

    residents: slots by expert, of every layer, as loading without a profile has filled them. The engine has these hits
    if it decodes one sequence and copies every miss (`miss="fetch"`) without prefetch; but the classes of class-lru
    depend on the number of the first step, which is 0 here and 1 there.
    """
    hits = np.zeros(ids.shape[:2], np.int32)
    for pool in pools:
        n = len(pool.layers)
        held = [(expert, i) for i, layer in enumerate(pool.layers) for expert in residents[layer]]
        first_to_last = [i * n_expert + expert for expert, i in sorted(held, reverse=True)]
        n_slot, served = len(pool.slots), np.ascontiguousarray(ids[:, pool.layers])
        hits[:, pool.layers] = replay(policy, served, range(n), n, n_expert, n_slot, first_to_last)[0]
    return hits
