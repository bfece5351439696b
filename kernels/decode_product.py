"""Products of few tokens (1 to 32) with quantized weights, read where they lie: routed experts and dense matrices.

Types with a fast path multiply in 8-bit integers: activations are rounded to int8 in runs of 16 with an f32 scale,
which puts the result 0.5 % from the exact product for a matrix of random weights, and 0.5 to 0.8 % for an expert (its
activations between up and down are rounded to 16 bits: a second plane of codes holds what the first one lost). The
other types, and blobs at odd addresses, are unpacked to f32 and multiplied exactly.

All launches have grids and constants that depend on shapes alone, so that they can be captured in a CUDA graph; with
`out` and the buffers given nothing is allocated. Where there is neither a GPU nor Triton's interpreter, the plain
versions of reference.py answer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_engine.kernels import decode_tiles, reference
from moe_engine.kernels.decode_activations import Activations, quantize
from moe_engine.kernels.decode_matvec import alignment, is_fast, matvec, matvecs, units, unpacking_tile
from moe_engine.kernels.device import run_kernels, table
from moe_engine.kernels.slot_layout import SlotLayout

__all__ = ["DECODE_TOKENS", "Activations", "MoeBuffers", "is_fast", "matvec", "matvecs", "moe_decode", "quantize"]

# 8-bit planes of codes for the activations between up and down: one, or a second with what rounding left. They are
# products, so a run's largest is far above the rest: with one plane a Q6_K expert's error is 1.02 %. The second costs
# 0.5 of 13.0 us for 8 experts of 2048x768 Q4_K on an H200, 4.5 of 64.5 us for 7168x2048.
_PLANES = 2


# Of a prompt outside of decode steps: more go through the tensor cores. These kernels decode a weight again for each
# token, except in small groups.
DECODE_TOKENS = 16


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


def moe_decode(
    x: Tensor,
    pool: Tensor,
    layout: SlotLayout,
    slots: Tensor,
    weights: Tensor,
    out: Tensor | None = None,
    buffers: MoeBuffers | None = None,
    *,
    activations: Activations | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the chosen experts, `sum_j w_j down_j(silu(gate_j x) * up_j x)`, plus `residual`: f32
    `[n_token, hidden]`.

    A shared expert or a dense feed-forward is the same with top_k 1: see `SlotLayout.pack`.

    x: f32, f16 or bf16 `[n_token, hidden]`. pool: uint8 `[n_slot, slot_bytes]`. slots: int32 `[n_token, top_k]`, each
    choice's slot, or -1 for one that adds nothing and is not read. weights: f32 `[n_token, top_k]`. All contiguous.
    out: f32 of the result's shape, overwritten. activations: `quantize` of x, which is then read only for types without
    a fast path. residual: contiguous f32 of the result's shape; it may be `out`.
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
    if residual is not None:
        assert residual.shape == out.shape, (residual.shape, out.shape)
        assert residual.is_contiguous()
        assert residual.dtype == torch.float32, residual.dtype
    if n_token == 0 or len(pool) == 0:  # without slots there is nothing to add
        return out.zero_() if residual is None else out.copy_(residual)
    if not run_kernels(x):
        y = reference.moe_decode(x, lambda slot: layout.parts(pool[slot]), slots, weights)
        return out.copy_(y if residual is None else y + residual)
    if buffers is None:
        buffers = MoeBuffers.empty(layout, n_token, top_k, x.device)
    if activations is None:
        activations = buffers.x
        if any(is_fast(part.type) for part in (layout.gate, layout.up)):
            quantize(x, activations)
    assert activations.codes.shape == x.shape, (activations.codes.shape, x.shape)
    with torch.cuda.device_of(x):
        _launch_moe(x, activations, pool, layout, slots, weights, out, residual, buffers)
    return out


def _launch_moe(
    x: Tensor,
    activations: Activations,
    pool: Tensor,
    layout: SlotLayout,
    slots: Tensor,
    weights: Tensor,
    out: Tensor,
    residual: Tensor | None,
    buffers: MoeBuffers,
) -> None:
    from moe_engine.kernels.decode_moe_kernels import down_kernel, down_unpacked_kernel, gate_up_kernel
    from moe_engine.kernels.decode_overlap import overlap_options

    n_token, top_k = slots.shape
    base, slot_bytes = pool.data_ptr(), layout.slot_bytes
    gate_align = alignment(layout.gate.type, base, slot_bytes)
    up_align = alignment(layout.up.type, base, slot_bytes, layout.up.offset)
    down_align = alignment(layout.down.type, base, slot_bytes, layout.down.offset)
    # Newer versions of Triton warn unless told whether to contract products and sums
    options: dict[str, Any] = {"enable_fp_fusion": True} | overlap_options(x.device)
    tile = decode_tiles.gate_up_tile() if gate_align and up_align else decode_tiles.unpacked_tile(16)
    gate_runs, up_runs = unpacking_tile(layout.gate.type), unpacking_tile(layout.up.type)
    gate_up_kernel[n_token * top_k, -(-layout.n_ff // tile["ROWS"])](
        pool,
        slots,
        weights,
        x,
        activations.codes,
        activations.pairs,
        table(layout.gate.type.id, x.device),
        table(layout.up.type.id, x.device),
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
        GATE_UNITS=units(layout.gate.type, layout.hidden),
        GATE_ROW_BYTES=layout.gate.type.row_bytes(layout.hidden),
        UP=layout.up.type.name,
        UP_ALIGN=up_align,
        UP_BLOCK_BYTES=layout.up.type.block_bytes,
        UP_RUN=up_runs["N_RUN"],
        UP_WIDTH=up_runs["RUN_WIDTH"],
        UP_UNITS=units(layout.up.type, layout.hidden),
        UP_ROW_BYTES=layout.up.type.row_bytes(layout.hidden),
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
        "RESIDUAL": residual is not None,
    }
    if down_align:
        tile = decode_tiles.down_tile(n_token, top_k, units(layout.down.type, layout.n_ff))
        down_kernel[n_token, -(-layout.hidden // tile["ROWS"])](
            pool,
            slots,
            buffers.h.codes,
            buffers.h.pairs,
            out if residual is None else residual,
            out,
            n_token,
            ALIGN=down_align,
            N_UNIT=units(layout.down.type, layout.n_ff),
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
            table(layout.down.type.id, x.device),
            out if residual is None else residual,
            out,
            BLOCK_BYTES=layout.down.type.block_bytes,
            ROWS=tile["ROWS"],
            num_warps=tile["num_warps"],
            **common,
            **unpacking_tile(layout.down.type),
            **options,
        )
