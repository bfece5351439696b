"""The Triton kernel that `prompt_attention` launches: causal attention of a block of queries with an online softmax."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.dequantize_kernel import INTERPRETED, round_to
from moe_engine.kernels.launch import launched


@triton.jit
def _dot(a, b, sums):
    """sums + a b; Triton's interpreter has no products of bf16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _tile(p, stride, row, n_row, DIM: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows `row` of DIM values at `p`, as WIDTH columns; zero past DIM and, if BOUNDED, past n_row."""
    d = tl.arange(0, WIDTH)
    at = p + row[:, None] * stride + d[None, :]
    if BOUNDED:
        mask = (row < n_row)[:, None] & (d < DIM)[None, :]
        return tl.load(at, mask=mask, other=0.0)
    elif DIM != WIDTH:
        return tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _attend(
    sums,
    total,
    maximum,
    q,
    q_shared,
    k,
    k_shared,
    v,
    k_stride,
    k_shared_stride,
    v_stride,
    scale,
    start,
    stop,
    last_visible,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    D_SHARED: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes in the keys from start to stop: all visible to all rows, or, if MASKED, up to each row's `last_visible`."""
    lane = tl.arange(0, KEYS)
    for first in range(start, stop, KEYS):
        base = tl.cast(first, tl.int64)
        left = stop - first
        k_tile = _tile(k + base * k_stride, k_stride, lane, left, D, D_BLOCK, MASKED)
        scores = _dot(q, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
        if D_SHARED:
            shared = _tile(
                k_shared + base * k_shared_stride, k_shared_stride, lane, left, D_SHARED, SHARED_BLOCK, MASKED
            )
            scores = _dot(q_shared, tl.trans(shared), scores)
        if MASKED:
            scores = tl.where(first + lane[None, :] <= last_visible[:, None], scores, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new[:, None])
        decay = tl.exp2(maximum - new)
        maximum = new
        total = total * decay + tl.sum(p, 1)
        v_tile = _tile(v + base * v_stride, v_stride, lane, left, DV, DV_BLOCK, MASKED)
        sums = _dot(round_to(p, v_tile.dtype), v_tile, sums * decay[:, None])
    return sums, total, maximum


@launched
@triton.jit(do_not_specialize=["position", "n_token"])
def prompt_attention_kernel(
    query,
    query_shared,
    key,
    key_shared,
    value,
    out,
    q_stride,
    q_head_stride,
    q_shared_stride,
    q_shared_head_stride,
    k_stride,
    k_head_stride,
    k_shared_stride,
    v_stride,
    v_head_stride,
    out_stride,
    out_head_stride,
    scale,
    position,
    n_token,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    D_SHARED: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (h, b) is head h and the b-th block of queries from the end: those with the most keys start first."""
    head = tl.program_id(0).to(tl.int64)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    r = tl.arange(0, ROWS)
    left = n_token - first_row
    row = first_row.to(tl.int64)
    k = key + head // GROUP * k_head_stride
    v = value + head // GROUP * v_head_stride
    q = query + head * q_head_stride + row * q_stride
    q = round_to(_tile(q, q_stride, r, left, D, D_BLOCK, True).to(tl.float32), key.dtype.element_ty)
    q_shared = query_shared + head * q_shared_head_stride + row * q_shared_stride
    if D_SHARED:
        q_shared = _tile(q_shared, q_shared_stride, r, left, D_SHARED, SHARED_BLOCK, True)
        q_shared = round_to(q_shared.to(tl.float32), key.dtype.element_ty)
    sums = tl.zeros([ROWS, DV_BLOCK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    last_visible = position + first_row + r
    # Keys that all rows see, in whole tiles; then those around the diagonal
    whole = (position + first_row + 1) // KEYS * KEYS
    stop = position + tl.minimum(first_row + ROWS, n_token)
    sums, total, maximum = _attend(
        sums, total, maximum, q, q_shared, k, key_shared, v, k_stride, k_shared_stride, v_stride, scale,
        0, whole, last_visible, D, D_BLOCK, D_SHARED, SHARED_BLOCK, DV, DV_BLOCK, ROWS, KEYS, False,
    )  # fmt: skip
    sums, total, maximum = _attend(
        sums, total, maximum, q, q_shared, k, key_shared, v, k_stride, k_shared_stride, v_stride, scale,
        whole, stop, last_visible, D, D_BLOCK, D_SHARED, SHARED_BLOCK, DV, DV_BLOCK, ROWS, KEYS, True,
    )  # fmt: skip
    d = tl.arange(0, DV_BLOCK)
    at = out + head * out_head_stride + row * out_stride + r[:, None] * out_stride + d[None, :]
    mask = (r < left)[:, None] & (d < DV)[None, :]
    tl.store(at, round_to(sums / total[:, None], out.dtype.element_ty), mask=mask)
