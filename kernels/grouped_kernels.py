"""Triton kernels of the grouped product: rows sorted by expert times quantized matrices; grouped_product.py launches.

A program computes BLOCK_M rows of one group times BLOCK_N rows of its weight, as W x^T: the weight tile is
dequantized to bf16 on its way to the tensor cores, which accumulate in f32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.dequantize_kernel import INTERPRETED, dequantize_tile, round_to, unpack_blocks
from moe_engine.kernels.grouped_decoders import (
    flat,
    q4_k_decode,
    q4_k_load,
    q6_k_decode,
    q6_k_load,
    q8_0_decode,
    q8_0_load,
)
from moe_engine.kernels.launch import launched


@launched
@triton.jit(do_not_specialize=["n_pair"])
def sort_kernel(ids, offsets, token, place, n_pair, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program e places the pairs of expert e, in their order, behind all those of the experts before it."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    n_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_pair, BLOCK):
        i = start + lane
        n_before += (tl.load(ids + i, mask=i < n_pair, other=expert) < expert).to(tl.int32)
    row = tl.sum(n_before, 0)
    tl.store(offsets + expert, row)
    for start in range(0, n_pair, BLOCK):
        i = start + lane
        here = (tl.load(ids + i, mask=i < n_pair, other=-1) == expert).to(tl.int32)
        at = row + tl.cumsum(here, 0) - 1
        tl.store(token + at, i // TOP_K, mask=here > 0)
        tl.store(place + i, at, mask=here > 0)
        row += tl.sum(here, 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(offsets + expert + 1, row)


# Pieces of larger tensors: one program serves them wherever they begin.
_PIECES = ["starts", "ends", "slots", "tile_group", "tile_row"]


@launched
@triton.jit(do_not_specialize=["n_group"], do_not_specialize_on_alignment=_PIECES)
def tile_map_kernel(
    starts, ends, slots, tile_group, tile_row, n_group,
    BLOCK_M: tl.constexpr, N_GROUP_POW2: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """For each row tile its group (-1 past the last tile) and its first row. A group with slot -1 has no tiles."""
    g = tl.arange(0, N_GROUP_POW2)
    start = tl.load(starts + g, mask=g < n_group, other=0)
    stop = tl.load(ends + g, mask=g < n_group, other=0)
    slot = tl.load(slots + g, mask=g < n_group, other=-1)
    n_tile = tl.where(slot >= 0, (stop - start + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(n_tile, 0)  # one past the group's last tile
    t = tl.program_id(0) * TILES + tl.arange(0, TILES)
    before = last[None, :] <= t[:, None]  # [TILES, N_GROUP_POW2]
    group = tl.sum(before.to(tl.int32), 1)
    here = group[:, None] == g[None, :]
    row = tl.sum(tl.where(here, (start - (last - n_tile) * BLOCK_M)[None, :], 0), 1) + t * BLOCK_M
    exists = group < N_GROUP_POW2
    tl.store(tile_group + t, tl.where(exists, group, -1))
    tl.store(tile_row + t, tl.where(exists, row, 0))


@triton.jit
def _dot(w, x, acc, BLOCK_M: tl.constexpr):
    """acc + x w^T, or its transpose: with few tokens it is w that fills the 64 rows of a matrix instruction."""
    if INTERPRETED:  # which would multiply the bits of bf16 numbers
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if BLOCK_M >= 64:
        return tl.dot(x, tl.trans(w), acc)
    else:
        return tl.dot(w, tl.trans(x), acc)


@triton.jit
def _product(x_rows, p, n_in, table, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TYPE: tl.constexpr,
             BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN_WIDTH: tl.constexpr,
             FAST: tl.constexpr):  # fmt: skip
    """x W^T: f32 `[BLOCK_M, BLOCK_N]`. x_rows: row pointers [BLOCK_M, 1]; p: weight row pointers [BLOCK_N, 1, 1]."""
    acc = tl.zeros([BLOCK_M, BLOCK_N] if BLOCK_M >= 64 else [BLOCK_N, BLOCK_M], tl.float32)
    if FAST and TYPE == "Q4_K":
        k = tl.arange(0, 64)
        k = 16 * (k // 32) + 32 * (k // 16 % 2) + k % 16  # the order of the decoder
        words = tl.zeros([BLOCK_N, 1, 4], tl.uint32)
        for step in range(n_in // 64):
            q, words, a, b, c, e = q4_k_load(p, step, words)
            w = q4_k_decode(q, a, b, c, e, step, BLOCK_N)
            acc = _dot(w, tl.load(x_rows + step * 64 + k[None, :]), acc, BLOCK_M)
    elif FAST and TYPE == "Q6_K":
        q, a, b, c, e = q6_k_load(p, 0)
        for step in range(n_in // 128):
            low, high = q6_k_decode(q, a, b, c, e, BLOCK_N)
            q, a, b, c, e = q6_k_load(p, tl.minimum(step + 1, n_in // 128 - 1))
            x_step = x_rows + step * 128 + tl.arange(0, 64)[None, :]
            acc = _dot(low, tl.load(x_step), acc, BLOCK_M)
            acc = _dot(high, tl.load(x_step + 64), acc, BLOCK_M)
    elif FAST and TYPE == "Q8_0":
        q, a = q8_0_load(p, 0)
        for step in range(n_in // 64):
            w = q8_0_decode(q, a, BLOCK_N)
            q, a = q8_0_load(p, tl.minimum(step + 1, n_in // 64 - 1))
            acc = _dot(w, tl.load(x_rows + step * 64 + tl.arange(0, 64)[None, :]), acc, BLOCK_M)
    elif FAST and TYPE == "BF16":
        k = tl.arange(0, 64)[None, :]
        rows = tl.multiple_of(tl.reshape(p, [BLOCK_N, 1]).to(tl.pointer_type(tl.bfloat16)), (16, 16))
        for step in range(n_in // 64):
            acc = _dot(tl.load(rows + step * 64 + k), tl.load(x_rows + step * 64 + k), acc, BLOCK_M)
    elif BLOCK_SIZE == 1:
        for k0 in range(0, n_in, 64):
            k = k0 + tl.arange(0, 64)
            s = tl.minimum(k, n_in - 1)[None, :, None]  # finite numbers, which meet zeros of x
            low = flat(unpack_blocks(p, s, tl.arange(0, 1)[None, None, :], table, TYPE), BLOCK_N)
            acc = _dot(low, tl.load(x_rows + k[None, :], mask=k[None, :] < n_in, other=0.0), acc, BLOCK_M)
    else:
        K: tl.constexpr = 32 if BLOCK_SIZE == 32 else 64
        w = tl.arange(0, RUN_WIDTH)[None, None, :]
        for k0 in range(0, n_in, K):
            s = (k0 % BLOCK_SIZE) // RUN_WIDTH + tl.arange(0, K // RUN_WIDTH)[None, :, None]
            y = unpack_blocks(p + k0 // BLOCK_SIZE * BLOCK_BYTES, s, w, table, TYPE)
            low = round_to(tl.reshape(y, [BLOCK_N, K]), tl.bfloat16)
            acc = _dot(low, tl.load(x_rows + (k0 + tl.arange(0, K))[None, :]), acc, BLOCK_M)
    if BLOCK_M >= 64:
        return acc
    else:
        return tl.trans(acc)


@triton.jit
def _gate_up_tile(x, row_index, out, gate, row_bytes, up_from_gate, row, stop, column, n_in, n_out, table,
                  HAS_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TYPE: tl.constexpr,
                  BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN_WIDTH: tl.constexpr,
                  FAST: tl.constexpr):  # fmt: skip
    # Row 2 i of the weight tile is row i of gate, row 2 i + 1 row i of up: one tile, and pairs that meet at the end
    n = tl.arange(0, BLOCK_N)[:, None, None]
    p = gate + tl.minimum(column + n // 2, n_out - 1).to(tl.int64) * row_bytes + (n % 2) * up_from_gate
    rows = row + tl.arange(0, BLOCK_M)
    source = tl.minimum(rows, stop - 1)
    if HAS_INDEX:
        source = tl.load(row_index + source)
    x_rows = x + source.to(tl.int64)[:, None] * n_in
    acc = _product(x_rows, p, n_in, table, BLOCK_M, BLOCK_N, TYPE, BLOCK_SIZE, BLOCK_BYTES, RUN_WIDTH, FAST)
    g, u = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
    e = tl.exp(-tl.abs(g))  # which cannot overflow
    h = round_to(g * tl.where(g >= 0, 1.0, e) / (1.0 + e) * u, out.dtype.element_ty)
    columns = column + tl.arange(0, BLOCK_N // 2)
    at = rows.to(tl.int64)[:, None] * n_out + columns[None, :]
    tl.store(out + at, h, mask=(rows < stop)[:, None] & (columns < n_out)[None, :])


@triton.jit
def _down_tile(x, out, down, row_bytes, row, stop, column, n_in, n_out, table,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TYPE: tl.constexpr,
               BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN_WIDTH: tl.constexpr,
               FAST: tl.constexpr):  # fmt: skip
    columns = column + tl.arange(0, BLOCK_N)
    p = down + tl.minimum(columns, n_out - 1).to(tl.int64)[:, None, None] * row_bytes
    rows = row + tl.arange(0, BLOCK_M)
    source = tl.minimum(rows, stop - 1)
    x_rows = x + source.to(tl.int64)[:, None] * n_in
    acc = _product(x_rows, p, n_in, table, BLOCK_M, BLOCK_N, TYPE, BLOCK_SIZE, BLOCK_BYTES, RUN_WIDTH, FAST)
    at = rows.to(tl.int64)[:, None] * n_out + columns[None, :]
    tl.store(out + at, round_to(acc, out.dtype.element_ty), mask=(rows < stop)[:, None] & (columns < n_out)[None, :])


@launched
@triton.jit(do_not_specialize=["n_column_tile"], do_not_specialize_on_alignment=_PIECES)
def gate_up_kernel(
    x, row_index, out, pool, ends, slots, tile_group, tile_row, table, slot_bytes, gate_at, up_from_gate,
    row_bytes, n_in, n_out, n_column_tile,
    HAS_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN_WIDTH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """silu(gate x) * (up x): program `t * n_column_tile + c` makes BLOCK_M rows by BLOCK_N / 2 columns of `out`."""
    tile = tl.program_id(0) // n_column_tile
    group = tl.load(tile_group + tile)
    if group >= 0:
        column = (tl.program_id(0) % n_column_tile) * (BLOCK_N // 2)
        row = tl.load(tile_row + tile)
        stop = tl.load(ends + group)
        gate = pool + tl.load(slots + group).to(tl.int64) * slot_bytes + gate_at
        if stop - row <= BLOCK_M // 2 and BLOCK_M > 16:
            _gate_up_tile(x, row_index, out, gate, row_bytes, up_from_gate, row, stop, column, n_in, n_out, table,
                          HAS_INDEX, BLOCK_M // 2 if BLOCK_M > 16 else 16, BLOCK_N, TYPE, BLOCK_SIZE, BLOCK_BYTES,
                          RUN_WIDTH, FAST)  # fmt: skip
        else:
            _gate_up_tile(x, row_index, out, gate, row_bytes, up_from_gate, row, stop, column, n_in, n_out, table,
                          HAS_INDEX, BLOCK_M, BLOCK_N, TYPE, BLOCK_SIZE, BLOCK_BYTES, RUN_WIDTH, FAST)  # fmt: skip


@launched
@triton.jit(do_not_specialize=["n_column_tile"], do_not_specialize_on_alignment=_PIECES)
def down_kernel(
    x, out, pool, ends, slots, tile_group, tile_row, table, slot_bytes, down_at,
    row_bytes, n_in, n_out, n_column_tile,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN_WIDTH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """down x: program `t * n_column_tile + c` makes BLOCK_M rows by BLOCK_N columns."""
    tile = tl.program_id(0) // n_column_tile
    group = tl.load(tile_group + tile)
    if group >= 0:
        column = (tl.program_id(0) % n_column_tile) * BLOCK_N
        row = tl.load(tile_row + tile)
        stop = tl.load(ends + group)
        down = pool + tl.load(slots + group).to(tl.int64) * slot_bytes + down_at
        if stop - row <= BLOCK_M // 2 and BLOCK_M > 16:
            _down_tile(x, out, down, row_bytes, row, stop, column, n_in, n_out, table,
                       BLOCK_M // 2 if BLOCK_M > 16 else 16, BLOCK_N, TYPE, BLOCK_SIZE, BLOCK_BYTES, RUN_WIDTH,
                       FAST)  # fmt: skip
        else:
            _down_tile(x, out, down, row_bytes, row, stop, column, n_in, n_out, table,
                       BLOCK_M, BLOCK_N, TYPE, BLOCK_SIZE, BLOCK_BYTES, RUN_WIDTH, FAST)  # fmt: skip


@launched
@triton.jit(do_not_specialize=["n_block"], do_not_specialize_on_alignment=_PIECES)
def dequantize_groups_kernel(
    pool, starts, ends, slots, table, out, slot_bytes, part_at, n_block, out_stride,
    TYPE: tl.constexpr, BLOCK_BYTES: tl.constexpr, N_RUN: tl.constexpr, RUN_WIDTH: tl.constexpr,
    DISTANCE: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (i, g): blocks `TILE_BLOCKS * i` and following of the matrix of group g, if that has rows, as bf16."""
    group = tl.program_id(1)
    slot = tl.load(slots + group)
    if (slot >= 0) & (tl.load(ends + group) > tl.load(starts + group)):
        matrix = pool + slot.to(tl.int64) * slot_bytes + part_at
        dequantize_tile(matrix, table, out + group.to(tl.int64) * out_stride, n_block, tl.program_id(0) * TILE_BLOCKS,
                        TYPE, BLOCK_BYTES, N_RUN, RUN_WIDTH, DISTANCE, TILE_BLOCKS)  # fmt: skip


@launched
@triton.jit
def sum_kernel(y, ids, place, weights, slots, out, n_column, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over k, in order, of weights[t, k] * y[place[t, k]]; experts with slot -1 are left out."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        here = tl.zeros([BLOCK], tl.int32) + tl.load(slots + tl.load(ids + choice)) >= 0
        row = y + tl.load(place + choice).to(tl.int64) * n_column
        value = tl.load(row + columns, mask=(columns < n_column) & here, other=0.0).to(tl.float32)
        total += value * tl.load(weights + choice)
    tl.store(out + token * n_column + columns, total, mask=columns < n_column)
