"""Products of few tokens (1 to 16) with quantized weights, read where they lie: routed experts and dense matrices.

Types with a fast path multiply in 8-bit integers: activations are rounded to int8 in runs of 16 with an f32 scale,
which puts the result 0.5 % from the exact product for a matrix of random weights, and 0.5 to 0.8 % for an expert (its
activations between up and down are rounded to 16 bits: a second plane of codes holds what the first one lost). The
other types, and blobs at odd addresses, are unpacked to f32 and multiplied exactly.

All launches have grids and constants that depend on shapes alone, so that they can be captured in a CUDA graph; with
`out` and the buffers given nothing is allocated. Where there is neither a GPU nor Triton's interpreter, the plain
versions of reference.py answer.
"""

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from moe_engine.kernels import decode_tiles, reference
from moe_engine.kernels.dequantize import _is_interpreted, _table
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import QuantType
from moe_engine.kernels.slot_layout import SlotLayout

RUN = 16
"""Activations that share a scale."""

# 8-bit planes of codes for the activations between up and down: one, or a second with what rounding left. They are
# products, so a run's largest is far above the rest: with one plane a Q6_K expert's error is 1.02 %. The second costs
# 0.5 of 13.0 us for 8 experts of 2048x768 Q4_K on an H200, 4.5 of 64.5 us for 7168x2048.
_PLANES = 2


# The most tokens these kernels are for: they decode a weight again for each token, except in small groups.
DECODE_TOKENS = 16


@dataclass(frozen=True)
class Activations:
    """Rows of 8-bit activations.

    codes: int8 `[n_row, n]`. pairs: f32 `[n_row, n / 16, 2]`, each run's scale and that times the sum of its codes.
    """

    codes: Tensor
    pairs: Tensor

    @classmethod
    def empty(cls, n_row: int, n: int, device: torch.device) -> "Activations":
        codes = torch.empty(n_row, n, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(n_row, n // RUN, 2, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class MoeBuffers:
    """What `moe_decode` writes on its way: the quantized input and the weighted activations between up and down."""

    x: Activations  # [n_token, hidden]
    h: Activations  # [planes * n_token * top_k, n_ff]
    h_float: Tensor  # f32 [n_token * top_k, n_ff], for types without a fast path

    @classmethod
    def empty(cls, layout: SlotLayout, n_token: int, top_k: int, device: torch.device) -> "MoeBuffers":
        n_pair = n_token * top_k
        return cls(
            Activations.empty(n_token, layout.hidden, device),
            Activations.empty(_PLANES * n_pair, layout.n_ff, device),
            torch.empty(n_pair, layout.n_ff, dtype=torch.float32, device=device),
        )


def is_fast(type: QuantType) -> bool:
    """Whether the type is multiplied in 8-bit integers."""
    from moe_engine.kernels.decode_units import UNIT_SIZES

    return type.name in UNIT_SIZES


def _alignment(type: QuantType, *offsets: int) -> int:
    """What all blocks' addresses are a multiple of, at most 16; 0 if the fast path cannot take them."""
    align = gcd(16, type.block_bytes, *offsets)
    if not is_fast(type):
        return 0
    return align if align % 2 == 0 or type.block_bytes % 2 == 1 else 0


def _runs(type: QuantType, limit: int = 128) -> dict[str, int]:
    """The tile that unpack.py cuts a block into; single elements are bundled."""
    from moe_engine.kernels.unpack import RUN_WIDTHS

    width = RUN_WIDTHS[type.name]
    return {"N_RUN": limit if type.block_size == 1 else type.block_size // width, "RUN_WIDTH": width}


def _units(type: QuantType, n_in: int) -> int:
    from moe_engine.kernels.decode_units import UNIT_SIZES

    return n_in // UNIT_SIZES.get(type.name, n_in)


def _run_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda or _is_interpreted()


def quantize(x: Tensor, out: Activations | None = None) -> Activations:
    """x, float `[n_row, n]` with contiguous rows and n a multiple of 16, as 8-bit activations."""
    assert x.dim() == 2, x.shape
    assert x.stride(1) == 1, x.stride()
    assert x.shape[1] % RUN == 0, x.shape
    if out is None:
        out = Activations.empty(x.shape[0], x.shape[1], x.device)
    assert out.codes.shape == x.shape, (out.codes.shape, x.shape)
    with torch.cuda.device_of(x):
        _launch_quantize(x, out)
    return out


def _launch_quantize(x: Tensor, out: Activations, overlap: bool = False) -> None:
    from moe_engine.kernels.decode_activations import quantize_kernel

    n_run = x.numel() // RUN
    runs = 32  # 512 elements a program: 1.0 us for 2048 elements, 1.4 for 7168 on an H200, all of it latency
    quantize_kernel[(-(-n_run // runs),)](
        x,
        out.codes,
        out.pairs,
        n_run,
        x.stride(0),
        RUNS_PER_ROW=x.shape[1] // RUN,
        RUNS=runs,
        OVERLAP=overlap,
        num_warps=4,
        enable_fp_fusion=True,
    )


def matvec(x: Tensor, weight: QuantTensor, out: Tensor | None = None, activations: Activations | None = None) -> Tensor:
    """x W^T for few tokens: f32 `[(n_batch,) n_token, n_out]`.

    x: f32, f16 or bf16 `[n_token, n_in]` with weight `[n_out, n_in]`, or `[n_batch, n_token, n_in]` with weight
    `[n_batch, n_out, n_in]`; contiguous. The blob may lie at any address. out: contiguous f32 of the result's shape.
    activations: `quantize` of x (its first dimensions joined), for several products with the same x.
    """
    assert x.is_contiguous(), x.stride()
    assert x.dim() == weight.data.dim(), (x.shape, weight.shape)
    assert x.shape[-1] == weight.n_in, (x.shape, weight.shape)
    assert weight.data.stride()[-2:] == (weight.data.shape[-1], 1), weight.data.stride()
    assert x.dim() == 2 or x.shape[0] == weight.data.shape[0], (x.shape, weight.shape)
    n_token, n_out = x.shape[-2], weight.n_out
    if out is None:
        out = torch.empty(*x.shape[:-1], n_out, dtype=torch.float32, device=x.device)
    assert out.shape == (*x.shape[:-1], n_out), (out.shape, x.shape, weight.shape)
    assert out.is_contiguous()
    assert out.dtype == torch.float32, out.dtype
    if out.numel() == 0:
        return out
    if not _run_kernels(x):
        return out.copy_(reference.matvec(x, weight))

    from moe_engine.kernels.decode_kernels import matvec_kernel

    n_batch = x.shape[0] if x.dim() == 3 else 1
    batch_stride = weight.data.stride(0) if x.dim() == 3 else 0
    row_bytes = weight.data.shape[-1]
    align = _alignment(weight.type, weight.data.data_ptr(), batch_stride)
    overlap = False
    if align and activations is None:
        overlap = _can_overlap(x.device)
        flat = x.view(-1, weight.n_in)
        activations = Activations.empty(flat.shape[0], weight.n_in, x.device)
        with torch.cuda.device_of(x):
            _launch_quantize(flat, activations, overlap)
    n_unit = _units(weight.type, weight.n_in)
    tile = decode_tiles.matvec_tile(n_token, n_out * n_batch) if align else decode_tiles.unpacked_tile() | {"TOKENS": 1}
    grid = (-(-n_token // tile["TOKENS"]), -(-n_out // tile["ROWS"]), n_batch)
    with torch.cuda.device_of(x):
        matvec_kernel[grid](
            weight.data,
            x,
            activations.codes if activations is not None else x,
            activations.pairs if activations is not None else x,
            _table(weight.type.id, x.device),
            out,
            n_token,
            n_out,
            weight.n_in,
            batch_stride,
            TYPE=weight.type.name,
            ALIGN=align,
            BLOCK_BYTES=weight.type.block_bytes,
            N_UNIT=n_unit,
            N_IN=weight.n_in,
            ROW_BYTES=row_bytes,
            OVERLAP=overlap,
            **_runs(weight.type),
            **tile,
            **_launch_options(overlap),
        )
    return out


def moe_decode(
    x: Tensor,
    pool: Tensor,
    layout: SlotLayout,
    slots: Tensor,
    weights: Tensor,
    out: Tensor | None = None,
    buffers: MoeBuffers | None = None,
) -> Tensor:
    """The weighted sum of the chosen experts, `sum_j w_j down_j(silu(gate_j x) * up_j x)`: f32 `[n_token, hidden]`.

    x: f32, f16 or bf16 `[n_token, hidden]`. pool: uint8 `[n_slot, slot_bytes]`. slots: int32 `[n_token, top_k]`, each
    choice's slot, or -1 for one that adds nothing and is not read. weights: f32 `[n_token, top_k]`. All contiguous.
    out: f32 of the result's shape, overwritten.
    """
    n_token, top_k = slots.shape
    assert x.shape == (n_token, layout.hidden), (x.shape, slots.shape, layout)
    assert pool.dtype == torch.uint8, pool.dtype
    assert pool.shape[1] == layout.slot_bytes, (pool.shape, layout)
    assert slots.dtype == torch.int32, slots.dtype
    assert weights.shape == slots.shape, (weights.shape, slots.shape)
    assert weights.dtype == torch.float32, weights.dtype
    assert all(t.is_contiguous() for t in (x, pool, slots, weights))
    if out is None:
        out = torch.empty(n_token, layout.hidden, dtype=torch.float32, device=x.device)
    assert out.shape == x.shape, (out.shape, x.shape)
    assert out.is_contiguous()
    assert out.dtype == torch.float32, out.dtype
    if n_token == 0 or len(pool) == 0:  # without slots there is nothing to add
        return out.zero_()
    if not _run_kernels(x):
        return out.copy_(reference.moe_decode(x, lambda slot: layout.parts(pool[slot]), slots, weights))
    if buffers is None:
        buffers = MoeBuffers.empty(layout, n_token, top_k, x.device)
    with torch.cuda.device_of(x):
        _launch_moe(x, pool, layout, slots, weights, out, buffers)
    return out


def _launch_moe(
    x: Tensor, pool: Tensor, layout: SlotLayout, slots: Tensor, weights: Tensor, out: Tensor, buffers: MoeBuffers
) -> None:
    from moe_engine.kernels.decode_kernels import down_kernel, down_unpacked_kernel, gate_up_kernel

    n_token, top_k = slots.shape
    base, slot_bytes = pool.data_ptr(), layout.slot_bytes
    gate_align = _alignment(layout.gate.type, base, slot_bytes)
    up_align = _alignment(layout.up.type, base, slot_bytes, layout.up.offset)
    down_align = _alignment(layout.down.type, base, slot_bytes, layout.down.offset)
    overlap = bool(gate_align and up_align and down_align) and _can_overlap(x.device)
    options = _launch_options(overlap)
    if gate_align or up_align:
        _launch_quantize(x, buffers.x, overlap)
    tile = decode_tiles.gate_up_tile() if gate_align and up_align else decode_tiles.unpacked_tile(16)
    gate_runs, up_runs = _runs(layout.gate.type), _runs(layout.up.type)
    gate_up_kernel[n_token * top_k, -(-layout.n_ff // tile["ROWS"])](
        pool,
        slots,
        weights,
        x,
        buffers.x.codes,
        buffers.x.pairs,
        _table(layout.gate.type.id, x.device),
        _table(layout.up.type.id, x.device),
        buffers.h_float,
        buffers.h.codes,
        buffers.h.pairs,
        layout.hidden,
        SLOT_BYTES=slot_bytes,
        TOP_K=top_k,
        N_IN=layout.hidden,
        N_FF=layout.n_ff,
        UP_START=layout.up.offset,
        GATE=layout.gate.type.name,
        GATE_ALIGN=gate_align,
        GATE_BLOCK_BYTES=layout.gate.type.block_bytes,
        GATE_RUN=gate_runs["N_RUN"],
        GATE_WIDTH=gate_runs["RUN_WIDTH"],
        GATE_UNITS=_units(layout.gate.type, layout.hidden),
        GATE_ROW_BYTES=layout.gate.type.row_bytes(layout.hidden),
        UP=layout.up.type.name,
        UP_ALIGN=up_align,
        UP_BLOCK_BYTES=layout.up.type.block_bytes,
        UP_RUN=up_runs["N_RUN"],
        UP_WIDTH=up_runs["RUN_WIDTH"],
        UP_UNITS=_units(layout.up.type, layout.hidden),
        UP_ROW_BYTES=layout.up.type.row_bytes(layout.hidden),
        OVERLAP=overlap,
        PLANES=_PLANES,
        QUANTIZE=down_align > 0,
        **tile,
        **options,
    )
    common: dict[str, Any] = {
        "SLOT_BYTES": slot_bytes,
        "TOP_K": top_k,
        "START": layout.down.offset,
        "N_FF": layout.n_ff,
        "N_OUT": layout.hidden,
        "DOWN": layout.down.type.name,
        "ROW_BYTES": layout.down.type.row_bytes(layout.n_ff),
    }
    if down_align:
        tile = decode_tiles.down_tile(_units(layout.down.type, layout.n_ff))
        down_kernel[n_token, -(-layout.hidden // tile["ROWS"])](
            pool,
            slots,
            buffers.h.codes,
            buffers.h.pairs,
            out,
            n_token,
            ALIGN=down_align,
            N_UNIT=_units(layout.down.type, layout.n_ff),
            OVERLAP=overlap,
            PLANES=_PLANES,
            **common,
            **tile,
            **options,
        )
    else:
        tile = decode_tiles.unpacked_tile()
        down_unpacked_kernel[n_token, -(-layout.hidden // tile["ROWS"])](
            pool,
            slots,
            buffers.h_float,
            _table(layout.down.type.id, x.device),
            out,
            BLOCK_BYTES=layout.down.type.block_bytes,
            ROWS=tile["ROWS"],
            num_warps=tile["num_warps"],
            **common,
            **_runs(layout.down.type),
            **options,
        )


@cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _launch_options(overlap: bool) -> dict[str, Any]:
    # Newer versions of Triton warn unless told whether to contract products and sums
    options: dict[str, Any] = {"enable_fp_fusion": True}
    return options | {"launch_pdl": True} if overlap else options
