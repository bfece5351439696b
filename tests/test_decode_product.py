"""The decode product of routed experts against float64 of the gguf package's values: on a GPU, else in Triton's
interpreter.
"""

import numpy as np
import pytest
import torch
from decode_inputs import DEVICE, all_types, error, place, poisoned, random_input, random_weight, values
from random_blocks import random_blocks
from torch import Tensor

from moe_engine.kernels.decode_product import MoeBuffers, is_fast, moe_decode, quantize
from moe_engine.kernels.quant_types import BY_NAME, QuantType
from moe_engine.kernels.slot_layout import SlotLayout

EXPERT_ERROR = 1e-2  # 8-bit activations, the inner ones are rounded as well


def random_pool(layout: SlotLayout, n_slot: int, offset: int = 0) -> Tensor:
    rng = np.random.default_rng(1)
    slots = []
    for _ in range(n_slot):
        gate = random_blocks(layout.gate.type, layout.n_ff, layout.hidden, rng)
        up = random_blocks(layout.up.type, layout.n_ff, layout.hidden, rng)
        down = random_blocks(layout.down.type, layout.hidden, layout.n_ff, rng)
        slot = np.full(layout.slot_bytes, 0xAA, dtype=np.uint8)
        for part, blocks in ((layout.gate, gate), (layout.up, up), (layout.down, down)):
            slot[part.offset : part.offset + part.nbytes] = blocks.ravel()
        slots.append(slot)
    return place(np.stack(slots), offset)


def exact_moe(x: Tensor, pool: Tensor, layout: SlotLayout, slots: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    x, weights = x.cpu().double(), weights.cpu().double()
    for token, choice in (slots.cpu() >= 0).nonzero().tolist():
        gate, up, down = (values(part) for part in layout.parts(pool[int(slots[token, choice])]))
        h = torch.nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
        y[token] += weights[token, choice] * (h @ down.T)
    return y


def layout_of(gate: str, up: str, down: str, hidden: int, n_ff: int) -> SlotLayout:
    return SlotLayout.of(BY_NAME[gate], BY_NAME[up], BY_NAME[down], hidden, n_ff)


def check_moe(layout: SlotLayout, slots: list[list[int]], offset: int = 0, seed: int = 0) -> Tensor:
    """Runs it into a poisoned result with poisoned buffers, and compares."""
    chosen = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    n_token, top_k = chosen.shape
    pool = random_pool(layout, max(map(max, slots)) + 1, offset)
    scale = 1 / (5 * layout.hidden**0.5)  # gate x of a size where silu bends
    x = random_input(n_token, layout.hidden, seed=seed) * scale
    weights = random_input(n_token, top_k, seed=seed + 1).softmax(dim=-1)
    buffers = MoeBuffers.empty(layout, n_token, top_k, DEVICE)
    for poison in (buffers.h.pairs, buffers.h_float):
        poison.fill_(float("nan"))
    out = poisoned(n_token, layout.hidden)
    assert moe_decode(x, pool, layout, chosen, weights, out=out, buffers=buffers) is out
    exact = exact_moe(x, pool, layout, chosen, weights)
    fast = any(is_fast(part.type) for part in (layout.gate, layout.up, layout.down))
    assert error(out, exact) < (2 * EXPERT_ERROR if fast else 1e-5)  # small products: a wide spread
    skipped = (chosen < 0).all(dim=1)
    assert (out[skipped] == 0).all()
    return out


@all_types
def test_moe(type: QuantType) -> None:
    check_moe(SlotLayout.of(type, type, type, 256, 256), [[2, 0]])


MIXED = [("Q4_K", "Q4_K", "Q6_K", 256, 768), ("IQ2_XXS", "Q4_K", "Q2_K", 256, 256), ("Q5_K", "IQ3_S", "Q5_0", 256, 96)]
MIXED += [("MXFP4", "MXFP4", "MXFP4", 288, 160), ("Q8_0", "Q4_0", "Q8_0", 96, 32), ("F16", "BF16", "F32", 48, 20)]


@pytest.mark.parametrize("types", MIXED, ids=lambda types: "-".join(map(str, types)))
def test_moe_of_many_tokens(types: tuple[str, str, str, int, int]) -> None:
    """Experts shared by tokens, a token's expert twice, choices and whole tokens without experts."""
    check_moe(layout_of(*types), [[1, 0, -1], [-1, -1, -1], [0, 0, 1]], offset=2)


def test_moe_of_eight_tokens() -> None:
    """Down has the choices side by side."""
    layout = layout_of("Q4_0", "Q4_0", "Q8_0", 96, 96)
    check_moe(layout, [[t % 3, -1 if t % 5 else 2, -1] for t in range(7)] + [[-1, -1, -1]])


def test_tokens_of_a_batch_depend_neither_on_slots_nor_on_others() -> None:
    """Exact mode relies on it: the same bits wherever an expert lies, and whatever other tokens choose."""
    layout = layout_of("Q4_0", "Q4_0", "Q4_0", 32, 96)
    pool = random_pool(layout, 2).repeat(2, 1)
    x, weights = random_input(5, 32), torch.ones(5, 2, device=DEVICE)
    slots = torch.tensor([[0, 1]] * 5, dtype=torch.int32, device=DEVICE)
    together = moe_decode(x, pool, layout, slots, weights)
    slots[1::2] += 2
    slots[::2, 1] = -1
    assert torch.equal(moe_decode(x, pool, layout, slots, weights)[1::2], together[1::2])


def test_token_does_not_depend_on_others() -> None:
    layout = layout_of("Q4_K", "Q5_K", "Q6_K", 256, 256)
    pool = random_pool(layout, 3)
    x = random_input(3, 256)
    slots = torch.tensor([[0, 1], [2, 1], [1, -1]], dtype=torch.int32, device=DEVICE)
    weights = torch.full((3, 2), 0.5, device=DEVICE)
    together = moe_decode(x, pool, layout, slots, weights)
    for t in range(3):
        one = slice(t, t + 1)
        assert torch.equal(moe_decode(x[one], pool, layout, slots[one], weights[one]), together[one])


@pytest.mark.parametrize("down", ["Q6_K", "IQ2_S"])
def test_dense_feed_forward(down: str) -> None:
    """One packed expert; with a residual, and with activations that another kernel left."""
    weights = [random_weight(BY_NAME[name], 256, 256, seed) for seed, name in enumerate(("Q4_K", "Q4_K", down))]
    layout, pool = SlotLayout.pack(*weights)
    assert torch.equal(layout.parts(pool[0])[2].data, weights[2].data)
    x, residual = random_input(2, 256) / 80, random_input(2, 256, seed=1)
    slots = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    ones = torch.ones(2, 1, device=DEVICE)
    plain = moe_decode(x, pool, layout, slots, ones)
    assert error(plain, exact_moe(x, pool, layout, slots, ones)) < 2 * EXPERT_ERROR
    both = moe_decode(x, pool, layout, slots, ones, activations=quantize(x), residual=residual)
    assert torch.equal(both, plain + residual)
    nothing = moe_decode(x, pool[:0], layout, slots - 1, ones, residual=residual)
    assert torch.equal(nothing, residual)


@all_types
def test_slots_are_aligned(type: QuantType) -> None:
    layout = SlotLayout.of(type, BY_NAME["MXFP4"], type, 256, 256)
    assert layout.up.offset % 16 == layout.down.offset % 16 == layout.slot_bytes % 16 == 0
    assert layout.up.offset - layout.gate.nbytes < 16


def test_nothing_chosen() -> None:
    layout = layout_of("Q4_K", "Q4_K", "Q4_K", 256, 256)
    slots = torch.full((2, 3), -1, dtype=torch.int32, device=DEVICE)
    weights = torch.ones(2, 3, device=DEVICE)
    x = random_input(2, 256)
    for n_slot in (0, 1):
        pool = torch.full((n_slot, layout.slot_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)
        assert (moe_decode(x, pool, layout, slots, weights, out=poisoned(2, 256)) == 0).all()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the error of few large products is the GPU's to measure")
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "MXFP4"])
def test_error_of_large_experts(name: str) -> None:
    layout = SlotLayout.of(BY_NAME[name], BY_NAME[name], BY_NAME[name], 2048, 768)
    pool = random_pool(layout, 2)
    slots = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    weights = torch.tensor([[0.7, 0.3]], device=DEVICE)
    x = random_input(1, 2048) / (5 * 2048**0.5)
    assert error(moe_decode(x, pool, layout, slots, weights), exact_moe(x, pool, layout, slots, weights)) < EXPERT_ERROR


@pytest.mark.skipif(DEVICE.type == "cpu", reason="graphs need CUDA")
def test_replayed_in_a_graph() -> None:
    layout = layout_of("Q4_K", "Q4_K", "Q6_K", 256, 256)
    pool = random_pool(layout, 4)
    x, slots = random_input(1, 256), torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    weights, out = torch.ones(1, 2, device=DEVICE), poisoned(1, 256)
    buffers = MoeBuffers.empty(layout, 1, 2, DEVICE)
    moe_decode(x, pool, layout, slots, weights, out, buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe_decode(x, pool, layout, slots, weights, out, buffers)
    for chosen in ([[1, 3]], [[-1, 2]]):
        slots.copy_(torch.tensor(chosen, dtype=torch.int32))
        x.copy_(random_input(1, 256, seed=5))
        graph.replay()
        assert torch.equal(out, moe_decode(x, pool, layout, slots, weights))


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a GPU nor the interpreter: the reference answers."""
    monkeypatch.setattr("moe_engine.kernels.device.is_interpreted", lambda: False)
    layout = layout_of("Q4_K", "Q4_K", "Q6_K", 256, 256)
    pool = random_pool(layout, 2).cpu()
    x = random_input(2, 256).cpu()
    slots = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.4, 0.6], [0.7, 0.3]])
    y = moe_decode(x, pool, layout, slots, weights)
    assert error(y, exact_moe(x, pool, layout, slots, weights)) < 1e-5
