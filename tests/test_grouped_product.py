"""The grouped product against float64 products and `PlainProduct`: on a GPU, else in the interpreter."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_blocks import random_blocks
from torch import Tensor

from moe_engine.kernels import grouped_product as gp
from moe_engine.kernels import reference
from moe_engine.kernels.plain_product import plain_prompt
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QUANT_TYPES, QuantType
from moe_engine.kernels.slot_layout import SlotLayout, SlotPart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS: tuple[gp.Method, ...] = ("fused", "dequantized")
all_types = pytest.mark.parametrize("type", QUANT_TYPES.values(), ids=str)
fast_types = pytest.mark.parametrize("type", [BY_NAME[name] for name in ("Q4_K", "Q6_K", "Q8_0")], ids=str)


def fewer_programs(tiling: gp._Tiling) -> gp._Tiling:
    """Every program of the grid costs the interpreter time."""
    return replace(tiling, block_n=256) if DEVICE == "cpu" else tiling


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = gp._tiling
    monkeypatch.setattr(gp, "_tiling", lambda n_row, n_group: fewer_programs(tiling(n_row, n_group)))


def layout_of(names: Sequence[str], n_embd: int, n_ff: int) -> SlotLayout:
    gate, up, down = (BY_NAME[name] for name in names)
    return SlotLayout.of(gate, up, down, n_embd, n_ff)


def random_pool(layout: SlotLayout, n_slot: int, seed: int, shift: int = 0, pad: int = 0) -> Tensor:
    """Slots of random experts whose outputs are of size 1; the first starts `shift` bytes into its buffer."""
    rng = np.random.default_rng(seed)
    slot_bytes = layout.slot_bytes + pad
    data = rng.integers(0, 256, (n_slot, slot_bytes), dtype=np.uint8)
    for part in (layout.gate, layout.up, layout.down):
        blocks = random_blocks(part.type, n_slot * part.n_out, part.n_in, rng)
        data[:, part.offset : part.offset + part.nbytes] = blocks.reshape(n_slot, -1)
    buffer = torch.zeros(shift + data.size + 64, dtype=torch.uint8, device=DEVICE)
    pool = buffer[shift : shift + data.size].view(n_slot, slot_bytes)
    pool.copy_(torch.from_numpy(data))
    return pool


def random_x(n: int, n_in: int, seed: int = 0) -> Tensor:
    x: Tensor = torch.randn(n, n_in, generator=torch.Generator().manual_seed(seed)) * n_in**-0.5
    return x.to(DEVICE, torch.bfloat16)


def values(pool: Tensor, slot: int, part: SlotPart) -> Tensor:
    data = pool[slot, part.offset : part.offset + part.nbytes].cpu().view(part.n_out, -1)
    matrix: Tensor = reference.dequantize(QuantTensor(data, part.type, part.n_in)).double()
    return matrix


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error, infinite where a value is not finite."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    if not actual.isfinite().all():
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def groups_of(counts: Sequence[int], slots: Sequence[int]) -> gp.Groups:
    ends = torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    starts = ends - torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    return gp.Groups(starts, ends, torch.tensor(slots, dtype=torch.int32, device=DEVICE))


def check_products(layout: SlotLayout, pool: Tensor, counts: Sequence[int], tiling: gp._Tiling | None) -> None:
    """Both products of groups of the given sizes, each against float64 on the same input."""
    slots = [(3 * g + 1) % len(pool) for g in range(len(counts))]
    groups = groups_of(counts, slots)
    n_row = sum(counts)
    x = random_x(n_row + 3, layout.gate.n_in)
    row_index = torch.randperm(n_row + 3, generator=torch.Generator().manual_seed(1))[:n_row].int().to(DEVICE)
    h = gp.grouped_gate_up(x, row_index, groups, pool, layout.gate, layout.up, tiling=tiling)
    y = gp.grouped_down(h, groups, pool, layout.down, tiling=tiling)
    rows, hidden = x[row_index].double().cpu(), h.double().cpu()
    start = 0
    h_exact, y_exact = torch.zeros(n_row, layout.gate.n_out).double(), torch.zeros(n_row, layout.down.n_out).double()
    for slot, count in zip(slots, counts, strict=True):
        here = slice(start, start + count)
        gate, up = (rows[here] @ values(pool, slot, part).T for part in (layout.gate, layout.up))
        h_exact[here] = torch.nn.functional.silu(gate) * up
        y_exact[here] = hidden[here] @ values(pool, slot, layout.down).T
        start += count
    assert error(h, h_exact) < 1e-2
    assert error(y, y_exact) < 1e-2


def widths(type: QuantType) -> tuple[int, int]:
    return {1: (40, 72), 32: (96, 64), 64: (128, 64), 256: (256, 256)}[type.block_size]


@all_types
def test_every_type(type: QuantType) -> None:
    n_embd, n_ff = widths(type)
    layout = SlotLayout.of(type, type, type, n_embd, n_ff)
    check_products(
        layout, random_pool(layout, 2, seed=type.id, shift=1), [3, 0, 18], fewer_programs(gp._Tiling(16, 64, 4, 2))
    )


@fast_types
@pytest.mark.parametrize("tiling", [gp._tiling(n, 1) for n in (1, 10, 100)], ids=lambda t: str(t.block_m))
def test_fast_types(type: QuantType, tiling: gp._Tiling) -> None:
    """Aligned slots take another path; tiles of all rows and of half of them, at the ends of groups."""
    layout = SlotLayout.of(type, type, type, 512, 256) if tiling.block_m < 64 else layout_of([type.name] * 3, 256, 256)
    pool = random_pool(layout, 3, seed=1)
    assert all(gp._is_fast(part, pool) for part in (layout.gate, layout.up, layout.down))
    m = tiling.block_m
    check_products(layout, pool, [m + 1, 0, m // 2], fewer_programs(tiling))


@fast_types
@pytest.mark.parametrize(("shift", "pad"), [(0, 2), (2, 4), (1, 0), (0, 5)])
def test_unaligned_slots(type: QuantType, shift: int, pad: int) -> None:
    layout = SlotLayout.of(type, type, type, 256, 256)
    check_products(layout, random_pool(layout, 3, 2, shift, pad), [5, 1, 0, 9], None)


def test_widths_that_no_tile_divides() -> None:
    layout = layout_of(("Q8_0", "Q8_0", "Q4_0"), 160, 224)
    check_products(layout, random_pool(layout, 2, 3), [7, 2], None)
    layout = layout_of(("Q8_0", "Q8_0", "Q8_0"), 384, 128)
    check_products(layout, random_pool(layout, 2, 3), [7, 70], None)


@pytest.mark.parametrize("counts", [[0, 0, 300, 0], [0], [0, 0], [1, 1, 1, 1, 1], [64, 128, 129, 0, 33]], ids=str)
def test_ragged_groups(counts: list[int]) -> None:
    layout = layout_of(("Q8_0", "Q8_0", "Q8_0"), 128, 128)
    check_products(layout, random_pool(layout, 4, 4), counts, None)


def routing(n_token: int, top_k: int, n_expert: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(n_token, n_expert, generator=generator).topk(top_k).indices.int()
    return ids.to(DEVICE), torch.rand(n_token, top_k, generator=generator).to(DEVICE)


def test_sort_by_expert() -> None:
    ids, _ = routing(13, 3, 7)
    pairs = gp.sort_by_expert(ids, 7)
    bounds = pairs.offsets.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == 39
    for expert in range(7):
        tokens = pairs.token[bounds[expert] : bounds[expert + 1]].tolist()
        assert tokens == (ids == expert).nonzero()[:, 0].tolist()
    assert sorted(pairs.place.reshape(-1).tolist()) == list(range(39))
    token = torch.arange(13, device=DEVICE, dtype=torch.int32)[:, None].expand(13, 3)
    assert torch.equal(pairs.token[pairs.place.long()], token)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q4_0", "Q5_0"), ("IQ3_S", "IQ3_S", "MXFP4")])
def test_moe_prompt(method: gp.Method, names: tuple[str, str, str]) -> None:
    """Types that differ, experts anywhere in the pool, some of them absent."""
    layout = layout_of(names, 256, 256)
    pool = random_pool(layout, 6, seed=5)
    slots = torch.tensor([4, -1, 0, 5, 2, -1, 1], dtype=torch.int32, device=DEVICE)
    ids, weights = routing(11, 3, 7)
    x = random_x(11, 256)
    out = gp.moe_prompt(x, ids if method == "fused" else ids.long(), weights, slots, pool, layout, method)
    assert out.dtype == torch.float32
    assert error(out, plain_prompt(x, ids, weights, slots, pool, layout)) < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_to_the_same_experts(method: gp.Method) -> None:
    layout = layout_of(["Q4_K"] * 3, 256, 256)
    pool = random_pool(layout, 4, seed=6)
    slots = torch.arange(4, dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE).expand(70, 2)
    weights = torch.rand(70, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = random_x(70, 256)
    out = gp.moe_prompt(x, ids, weights, slots, pool, layout, method)
    assert error(out, plain_prompt(x, ids, weights, slots, pool, layout)) < 1e-2


def test_few_experts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory for two of them, then for none: at least so many are written out at once."""
    layout = layout_of(("Q8_0", "Q8_0", "Q8_0"), 128, 128)
    pool = random_pool(layout, 5, seed=7)
    ids, weights = routing(9, 2, 5)
    x, slots = random_x(9, 128), torch.tensor([4, 0, -1, 3, 1], dtype=torch.int32, device=DEVICE)
    expected = plain_prompt(x, ids, weights, slots, pool, layout)
    for limit, least in ((4 * 2 * 128 * 128, 1), (0, 1), (0, 3)):
        monkeypatch.setattr("moe_engine.kernels.grouped_expand.SCRATCH_BYTES", limit)
        monkeypatch.setattr("moe_engine.kernels.grouped_expand.EXPERTS_AT_ONCE", least)
        assert error(gp.moe_prompt(x, ids, weights, slots, pool, layout, "dequantized"), expected) < 1e-2


def test_same_bits_in_other_slots_and_each_time() -> None:
    layout = layout_of(("Q4_K", "Q4_K", "Q6_K"), 256, 256)
    pool = random_pool(layout, 5, seed=7)
    ids, weights = routing(20, 2, 5)
    x = random_x(20, 256)
    slots = torch.arange(5, dtype=torch.int32, device=DEVICE)
    out = gp.moe_prompt(x, ids, weights, slots, pool, layout)
    assert torch.equal(out, gp.moe_prompt(x, ids, weights, slots, pool, layout))
    assert torch.equal(out, gp.moe_prompt(x, ids, weights, slots.flip(0), pool.flip(0), layout))
    product = gp.PromptProduct(x, ids, weights, 5, layout)  # some at a time, not in order
    groups = product.sorted.groups(slots)
    for experts in ([0, 3], [1, 2, 4]):
        some = gp.Groups(groups.starts[experts], groups.ends[experts], groups.slots[experts])
        tiles, _ = gp.tile_map(some.starts.cpu().numpy(), some.ends.cpu().numpy(), product.block_m)
        of_group, row = torch.from_numpy(tiles).to(DEVICE)
        product.add(pool, some, (of_group, row))
    assert torch.equal(out, product.sum(slots))


def test_groups_without_a_slot_are_left_alone() -> None:
    layout = layout_of(["Q8_0"] * 3, 128, 128)
    pool = random_pool(layout, 1, seed=8)
    groups = groups_of([3, 4, 5], [-1, 0, -1])
    x = random_x(12, 128)
    h = gp.grouped_gate_up(x, None, groups, pool, layout.gate, layout.up)
    gate, up = (x[3:7].double().cpu() @ values(pool, 0, part).T for part in (layout.gate, layout.up))
    assert error(h[3:7], torch.nn.functional.silu(gate) * up) < 1e-2


@pytest.mark.parametrize(
    ("name", "gate_up", "down"),
    [("Q4_K", "fffd", "fffd"), ("Q6_K", "fddd", "fddd"), ("Q8_0", "dddd", "ffdd"), ("IQ3_S", "dddd", "dddd")],
)
def test_the_faster_method_is_taken(name: str, gate_up: str, down: str) -> None:
    """By rows of an expert; where blocks lie askew it is always `dequantized`."""
    layout = layout_of([name] * 3, 256, 256)
    pool, askew = (random_pool(layout, 1, seed=0, shift=shift) for shift in (0, 1))
    for rows, *expected in zip((8, 24, 256, 512), gate_up, down, strict=True):
        for part, is_down, method in zip((layout.gate, layout.down), (False, True), expected, strict=True):
            assert gp.choose_method(part, pool, rows, is_down)[0] == method
            assert gp.choose_method(part, askew, rows, is_down) == "dequantized"


@given(
    groups=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 70)), max_size=9),
    block_m=st.sampled_from([16, 32]),
)
def test_tiles_that_the_host_makes(groups: list[tuple[int, int]], block_m: int) -> None:
    """Group by group, each tile begins where the one before ended. groups: first row and number of rows."""
    starts, counts = (
        np.array(column, dtype=np.int64) for column in (zip(*groups, strict=True) if groups else ([], []))
    )
    tiles, last = gp.tile_map(starts, starts + counts, block_m)
    of_group = [[(g, row) for row in range(start, start + n, block_m)] for g, (start, n) in enumerate(groups)]
    assert [*zip(*tiles.tolist(), strict=True)] == [tile for of_one in of_group for tile in of_one]
    assert last.tolist() == [*accumulate(map(len, of_group))]


@pytest.mark.gpu
def test_large_groups_on_the_gpu() -> None:
    layout = layout_of(("Q4_K", "Q4_K", "Q6_K"), 2048, 768)
    pool = random_pool(layout, 8, seed=9)
    slots = torch.arange(8, dtype=torch.int32, device=DEVICE)
    ids, weights = routing(3000, 2, 8)
    x = random_x(3000, 2048)
    expected = plain_prompt(x, ids, weights, slots, pool, layout)
    for method in METHODS:
        assert error(gp.moe_prompt(x, ids, weights, slots, pool, layout, method), expected) < 1e-2
