"""Device functions: rows of quantized matrices times few tokens.

Activations come as `(codes, pairs)`: int8 codes in runs of 16, and for each run its f32 scale and that scale times the
sum of its codes. Types without a fast path (and blobs at odd addresses) take f32 activations instead and are unpacked
to f32. Sums have a fixed order and every (token, row) its own, so a token's result does not depend on the others.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_runs import in_row_order
from moe_engine.kernels.decode_units import unit_dot
from moe_engine.kernels.dequantize_kernel import unpack_blocks


@triton.jit
def fast_dots(
    rows,
    codes,
    pairs,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    N_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """rows: pointers `[ROWS]`; codes, pairs: the tokens' pointers `[TOKENS]`. Returns f32 `[ROWS, TOKENS]`."""
    row = rows[:, None, None]
    x = codes[None, :, None]
    x_pairs = pairs[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    total = tl.zeros([ROWS, TOKENS, LANES], tl.float32)
    for start in tl.range(0, N_UNIT, LANES, loop_unroll_factor=UNROLL):
        # Past the end the last unit is read again: no masks on loads
        y = unit_dot(row, tl.minimum(start + lane, N_UNIT - 1), x, x_pairs, TYPE, ALIGN)
        if N_UNIT % LANES != 0:
            y = tl.where(start + lane < N_UNIT, y, 0.0)
        total += y
    return tl.sum(total, axis=2)


@triton.jit
def tile_dots(
    rows,
    x,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    N_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The same on the tensor cores: x are the tokens' pointers to bf16 `[TOKENS]`. LANES divides N_UNIT."""
    row = rows[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in tl.range(0, N_UNIT, LANES, loop_unroll_factor=UNROLL):
        total += unit_dot(row, start + lane, x[None, :, None], x[None, :, None], TYPE, ALIGN)
    return in_row_order(total)


@triton.jit
def unpacked_dots(
    rows,
    x,
    table,
    TYPE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    N_RUN: tl.constexpr,
    RUN_WIDTH: tl.constexpr,
    N_IN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rows: pointers `[ROWS]`; x: pointer to a token's f32 values. Returns f32 `[ROWS]`.

    Blocks of one element come in bundles of N_RUN, the last one filled up with the row's last element.
    """
    s = tl.arange(0, N_RUN)[None, :, None]
    w = tl.arange(0, RUN_WIDTH)[None, None, :]
    p = rows[:, None, None]
    total = tl.zeros([ROWS, N_RUN, RUN_WIDTH], tl.float32)
    for start in range(0, N_IN, N_RUN * RUN_WIDTH):
        if RUN_WIDTH == 1:
            inside = start + s < N_IN
            y = unpack_blocks(p, tl.minimum(start + s, N_IN - 1), w, table, TYPE)
            total += y * tl.load(x + start + s, mask=inside, other=0.0).to(tl.float32)
        else:
            y = unpack_blocks(p + start // (N_RUN * RUN_WIDTH) * BLOCK_BYTES, s, w, table, TYPE)
            total += y * tl.load(x + start + s * RUN_WIDTH + w).to(tl.float32)
    return tl.sum(tl.sum(total, axis=2), axis=1)
