"""The decode products against float64 of the gguf package's values: on a GPU, else in Triton's interpreter."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from random_blocks import random_blocks
from torch import Tensor

from moe_engine.kernels import decode_tiles, reference
from moe_engine.kernels.decode_product import Activations, MoeBuffers, is_fast, matvec, matvecs, moe_decode, quantize
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QUANT_TYPES, QuantType
from moe_engine.kernels.slot_layout import SlotLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = list(QUANT_TYPES.values())
FAST = [type for type in TYPES if is_fast(type)]
all_types = pytest.mark.parametrize("type", TYPES, ids=str)

# 8-bit activations: a matrix, and an expert (whose inner activations are rounded as well).
MATRIX_ERROR, EXPERT_ERROR = 6e-3, 1e-2
FLOAT_ERROR = 1e-6


def place(data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], offset: int = 0) -> Tensor:
    """A copy on the device that starts `offset` bytes into a buffer of other bytes."""
    buffer = torch.full((offset + data.size + 64,), 0xAA, dtype=torch.uint8, device=DEVICE)
    return buffer[offset : offset + data.size].view(data.shape).copy_(torch.from_numpy(data.copy()))


def random_weight(type: QuantType, n_out: int, n_in: int, seed: int = 0, offset: int = 0) -> QuantTensor:
    return QuantTensor(place(random_blocks(type, n_out, n_in, np.random.default_rng(seed)), offset), type, n_in)


def values(weight: QuantTensor) -> Tensor:
    """F64 on the CPU."""
    data = np.ascontiguousarray(weight.data.cpu().numpy())
    floats = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType(weight.type.id)).copy())
    return floats.view(weight.shape).double()


def random_input(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative, over the whole tensor; not a number if `actual` holds one."""
    return float((actual.cpu().double() - exact).norm() / exact.norm())


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


def test_quantize() -> None:
    x = random_input(3, 96) * torch.tensor([[1.0], [1e-20], [1e20]], device=DEVICE)
    x[0, 16:32] = 0.0
    q = quantize(x)
    runs = x.view(3, 6, 16)
    scale = q.pairs[..., 0]
    codes = q.codes.view(3, 6, 16).float()
    assert torch.equal(codes.abs().amax(dim=2), torch.where(runs.abs().amax(dim=2) > 0, 127.0, 0.0))
    assert ((codes * scale[..., None] - runs).abs() <= 0.501 * scale[..., None]).all()
    torch.testing.assert_close(q.pairs[..., 1], scale * codes.sum(dim=2))
    bad = torch.ones(1, 16, device=DEVICE)
    bad[0, 3] = float("nan")
    assert quantize(bad).pairs.isnan().all()


@all_types
@pytest.mark.parametrize(("n_token", "n_out", "n_block", "offset"), [(1, 19, 3, 0), (3, 5, 1, 2)])
def test_matvec(type: QuantType, n_token: int, n_out: int, n_block: int, offset: int) -> None:
    n_in = n_block * max(type.block_size, 32)
    weight = random_weight(type, n_out, n_in, offset=offset)
    x = random_input(n_token, n_in)
    out = poisoned(n_token, n_out)
    assert matvec(x, weight, out=out) is out
    exact = x.cpu().double() @ values(weight).T
    assert error(out, exact) < (2 * MATRIX_ERROR if is_fast(type) else FLOAT_ERROR)  # few elements: a wide spread


@pytest.mark.parametrize(("name", "few_rows"), [("Q4_K", 0), ("Q6_K", 22), ("IQ2_S", 22)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matvec_of_many_tokens(name: str, dtype: torch.dtype, few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a form (8-bit activations, or bf16 from five tokens on) tokens do not depend on each other."""
    monkeypatch.setattr(decode_tiles, "FEW_ROWS", few_rows)
    weight = random_weight(BY_NAME[name], 21, 768)
    x = random_input(16, 768).to(dtype)
    exact = x.cpu().double() @ values(weight).T
    y, few = matvec(x, weight), matvec(x[:4], weight)
    for part in (y, few):
        assert error(part, exact[: len(part)]) < (MATRIX_ERROR if is_fast(weight.type) else FLOAT_ERROR)
    assert torch.equal(matvec(x[:2], weight), few[:2])
    assert torch.equal(matvec(x[:5], weight), y[:5])


@pytest.mark.parametrize("type", FAST, ids=str)
def test_matvec_on_tensor_cores(type: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tiles, "FEW_ROWS", 0)
    weight = random_weight(type, 37, 512)
    x, residual = random_input(7, 512), random_input(7, 37, seed=1)
    exact = x.cpu().double() @ values(weight).T + residual.cpu()
    assert error(matvec(x, weight, residual=residual), exact) < MATRIX_ERROR


@pytest.mark.parametrize("type", FAST, ids=str)
@pytest.mark.parametrize("offset", [4, 1])
def test_matvec_at_any_address(type: QuantType, offset: int) -> None:
    weight = random_weight(type, 5, 512, offset=offset)
    x = random_input(1, 512)
    exact = x.cpu().double() @ values(weight).T
    on_integers = offset % 2 == 0 or type.name == "MXFP4"
    assert error(matvec(x, weight), exact) < (2 * MATRIX_ERROR if on_integers else FLOAT_ERROR)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ1_M"])
def test_matvec_of_a_stack(name: str) -> None:
    type = BY_NAME[name]
    row_bytes = type.row_bytes(512)
    stack = random_weight(type, 3 * 7, 512).data.view(3, 7, row_bytes)
    whole = QuantTensor(stack, type, 512)
    x = random_input(3, 2, 512)
    exact = x.cpu().double() @ values(whole).transpose(1, 2)
    assert error(matvec(x, whole), exact) < MATRIX_ERROR
    some = whole.rows(2, 6)  # spaced matrices
    assert error(matvec(x, some), exact[..., 2:6]) < MATRIX_ERROR


def test_matvec_with_given_activations() -> None:
    weight = random_weight(BY_NAME["Q5_K"], 6, 256)
    x = random_input(3, 256)
    assert torch.equal(matvec(x, weight), matvec(x, weight, activations=quantize(x)))


def test_quantize_of_strided_stacks() -> None:
    x = random_input(2, 3, 80)[..., :48]
    for view in (x, x.transpose(0, 1)):
        q, flat = quantize(view), quantize(view.reshape(-1, 48))
        assert torch.equal(q.codes, flat.codes)
        assert torch.equal(q.pairs, flat.pairs)


@pytest.mark.parametrize(("name", "n_token"), [("Q4_K", 1), ("Q8_0", 3), ("IQ2_S", 2)])
def test_matvec_adds_a_residual_and_quantizes(name: str, n_token: int) -> None:
    weight = random_weight(BY_NAME[name], 48, 256)
    x, residual = random_input(n_token, 256), random_input(n_token, 48, seed=1)
    plain = matvec(x, weight)
    activations = Activations.empty(n_token, 48, x.device)
    out = matvec(x, weight, residual=residual, out_activations=activations)
    assert torch.equal(out, plain + residual)
    assert_quantized(activations, out)
    assert matvec(x, weight, residual, residual=residual) is residual
    assert torch.equal(residual, out)


def assert_quantized(activations: Activations, x: Tensor) -> None:
    """`activations` hold x, up to the last bit of a scale."""
    expected = quantize(x)
    assert ((activations.codes.int() - expected.codes.int()).abs() <= 1).all()
    assert (activations.codes != expected.codes).float().mean() < 1e-2
    torch.testing.assert_close(activations.pairs, expected.pairs, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_S"])
def test_matvec_of_heads_that_lie_side_by_side(name: str) -> None:
    """The batch is the second dimension in memory, before and after, as the heads of attention."""
    stack = random_weight(BY_NAME[name], 3 * 16, 256).data.view(3, 16, -1)
    weight = QuantTensor(stack, BY_NAME[name], 256)
    x = random_input(2, 3, 300)[..., :256].transpose(0, 1)  # [n_batch, n_token, n_in]
    rows, activations = poisoned(2, 3 * 16), Activations.empty(2, 3 * 16, x.device)
    out = rows.view(2, 3, 16).transpose(0, 1)
    matvec(x, weight, out, out_activations=activations)
    assert torch.equal(out, matvec(x.contiguous(), weight))
    assert_quantized(activations, rows)


@pytest.mark.parametrize(
    ("names", "n_token"),
    [(("Q4_K", "Q4_K", "Q6_K"), 1), (("Q5_0", "Q8_0"), 7), (("Q4_K", "IQ2_S", "Q6_K"), 2), (("Q4_0",), 1)],
    ids=str,
)
def test_matvecs(names: tuple[str, ...], n_token: int) -> None:
    heights = (48, 21, 130)
    weights = [random_weight(BY_NAME[name], n_out, 256) for name, n_out in zip(names, heights, strict=False)]
    x = random_input(n_token, 256)
    parts = matvecs(x, weights)
    given = matvecs(x, weights, poisoned(n_token, sum(part.shape[1] for part in parts)), quantize(x))
    for part, same, weight in zip(parts, given, weights, strict=True):
        assert torch.equal(part, matvec(x, weight))
        assert torch.equal(part, same)


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
    monkeypatch.setattr("moe_engine.kernels.dequantize._is_interpreted", lambda: False)
    layout = layout_of("Q4_K", "Q4_K", "Q6_K", 256, 256)
    pool = random_pool(layout, 2).cpu()
    x = random_input(2, 256).cpu()
    slots = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.4, 0.6], [0.7, 0.3]])
    y = moe_decode(x, pool, layout, slots, weights)
    assert error(y, exact_moe(x, pool, layout, slots, weights)) < 1e-5
    gate = layout.parts(pool[0])[0]
    assert torch.equal(matvec(x, gate), reference.matvec(x, gate))
