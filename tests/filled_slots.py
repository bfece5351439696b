"""Puts experts into slots by hand, for tests of what must not depend on them."""

import torch

from moe_engine import Engine
from moe_engine.expert_cache import CachedExperts
from moe_engine.graph_decoder import GraphDecoder


@torch.inference_mode()  # as the model was loaded
def empty_slots(engine: Engine) -> CachedExperts:
    experts = engine.experts
    assert isinstance(experts, CachedExperts)
    if isinstance(engine.decoder, GraphDecoder):
        engine.decoder.worker.settle()
    experts.slot_table.fill_(-1)
    return experts


@torch.inference_mode()
def fill_slots(engine: Engine) -> CachedExperts:
    """Every slot gets another expert than at load: the last ones of all layers first."""
    experts = empty_slots(engine)
    for pool in experts.pools.values():
        keys = [(layer, expert) for expert in reversed(range(experts.n_expert)) for layer in pool.layers]
        for slot, key in enumerate(keys[: len(pool.slots)]):
            experts.load(key, slot)
    return experts
