"""Puts experts into slots by hand, for tests of what must not depend on them."""

import torch

from moe_engine import Engine
from moe_engine.expert_cache import CachedExperts


@torch.inference_mode()  # as the model was loaded
def fill_slots(engine: Engine) -> CachedExperts:
    """Every slot gets an expert, the last ones of all layers first."""
    experts = engine.experts
    assert isinstance(experts, CachedExperts)
    for pool in experts.pools.values():
        keys = [(layer, expert) for expert in reversed(range(experts.n_expert)) for layer in pool.layers]
        for slot, key in enumerate(keys[: len(pool.slots)]):
            experts.load(key, slot)
    return experts
