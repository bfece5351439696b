"""The Triton kernels that `decode_attention` launches: attention over a split of the keys, and their combination."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_activations_kernel import rounded, step_of, store_run
from moe_engine.kernels.decode_overlap import let_next_kernel_start, wait_for_previous_kernel


@triton.jit
def _tile(
    values,
    scales,
    row,
    inside,
    row_width,
    DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Elements START .. START + WIDTH of the cache rows at element offsets `row * row_width`, zero past DIM."""
    d = START + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if START + WIDTH > DIM:
        mask = mask & (d < DIM)[None, :]
    x = tl.load(values + row[:, None] * row_width + d[None, :], mask=mask, other=0)
    if QUANTIZED:
        b = START // 32 + tl.arange(0, WIDTH // 32)
        mask = inside[:, None] & (b < DIM // 32)[None, :]
        s = tl.load(scales + row[:, None] * (row_width // 32) + b[None, :], mask=mask, other=0)
        s = tl.broadcast_to(s.to(tl.float32)[:, :, None], [ROWS, WIDTH // 32, 32])
        x = (x.to(tl.float32) * tl.reshape(s, [ROWS, WIDTH])).to(tl.float16)
    return x


@triton.jit
def _halves(x, dtype: tl.constexpr):
    """x f32 as dtype, and what that leaves over."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def _product(high, low, other, sums, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter has no products of bf16
        high, low, other = high.to(tl.float32), low.to(tl.float32), other.to(tl.float32)
    sums = tl.dot(high, other, sums, input_precision="ieee")
    if SPLIT:
        sums = tl.dot(low, other, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["capacity", "n_split"])
def split_kernel(
    query,
    k_values,
    k_scales,
    v_values,
    v_scales,
    positions,
    sums,
    maxima,
    totals,
    scale,
    capacity,
    n_token,
    n_split,
    GROUP: tl.constexpr,
    N_KV: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    DV2: tl.constexpr,
    LATENT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (split, key head, sequence and row block) attends to every n_split-th tile of keys.

    A row is (token, query head of the group). Head dimensions that are no power of two are cut in two: D1 + D2.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2) // ROW_BLOCKS + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    r = (tl.program_id(2) % ROW_BLOCKS) * ROWS + tl.arange(0, ROWS)
    token = r // GROUP
    first = tl.load(positions + sequence)
    n_key = tl.minimum(first + n_token, capacity)
    n_tile = tl.cdiv(n_key, KEYS)
    if split < n_tile:
        real = token < n_token
        head = (sequence * n_token + token) * (GROUP * N_KV) + kv_head * GROUP + r % GROUP
        d1 = tl.arange(0, D1)
        mask1 = real[:, None] & (d1 < D)[None, :]
        q = query + head.to(tl.int64)[:, None] * D
        q1_high, q1_low = _halves(tl.load(q + d1[None, :], mask=mask1, other=0.0) * scale, DTYPE)
        if D2:
            d2 = D1 + tl.arange(0, D2)
            mask2 = real[:, None] & (d2 < D)[None, :]
            q2_high, q2_low = _halves(tl.load(q + d2[None, :], mask=mask2, other=0.0) * scale, DTYPE)
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums1 = tl.zeros([ROWS, D1], tl.float32)
        if DV2:
            sums2 = tl.zeros([ROWS, DV2], tl.float32)
        base = sequence.to(tl.int64) * capacity
        for tile in range(split, n_tile, n_split):
            key = tile * KEYS + tl.arange(0, KEYS)
            inside = key < n_key
            row = (base + key) * N_KV + kv_head
            k1 = _tile(k_values, k_scales, row, inside, D, D, 0, D1, KEYS, QUANTIZED)
            scores = _product(q1_high, q1_low, tl.trans(k1), tl.zeros([ROWS, KEYS], tl.float32), SPLIT, UPCAST)
            if D2:
                k2 = _tile(k_values, k_scales, row, inside, D, D, D1, D2, KEYS, QUANTIZED)
                scores = _product(q2_high, q2_low, tl.trans(k2), scores, SPLIT, UPCAST)
            seen = inside[None, :] & (key[None, :] <= first + token[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(maximum, tl.max(scores, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)  # rows that see nothing yet
            p = tl.exp2(scores - safe[:, None])
            decay = tl.exp2(maximum - safe)
            maximum = new
            total = total * decay + tl.sum(p, 1)
            p_high, p_low = _halves(p, DTYPE)
            v1 = k1  # MLA's values are the first part of the same rows
            if not LATENT:
                v1 = _tile(v_values, v_scales, row, inside, D, D, 0, D1, KEYS, QUANTIZED)
            sums1 = _product(p_high, p_low, v1, sums1 * decay[:, None], SPLIT, UPCAST)
            if DV2:
                v2 = _tile(v_values, v_scales, row, inside, D, D, D1, D2, KEYS, QUANTIZED)
                sums2 = _product(p_high, p_low, v2, sums2 * decay[:, None], SPLIT, UPCAST)
        part = head.to(tl.int64) * n_split + split
        tl.store(maxima + part, maximum, mask=real)
        tl.store(totals + part, total, mask=real)
        tl.store(sums + part[:, None] * DV + d1[None, :], sums1, mask=mask1)
        if DV2:
            tl.store(sums + part[:, None] * DV + d2[None, :], sums2, mask=mask2)


@triton.jit(do_not_specialize=["capacity", "n_split"])
def combine_kernel(
    sums,
    maxima,
    totals,
    positions,
    out,
    codes,
    pairs,
    capacity,
    n_token,
    n_split,
    N_HEAD: tl.constexpr,
    DV: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BY_HEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (i, h) sums WIDTH elements of head h of all tokens over the splits, SPLITS at a time."""
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    head = tl.program_id(1).to(tl.int64) + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    n_key = tl.minimum(tl.load(positions + head // (n_token * N_HEAD)) + n_token, capacity)
    n_part = tl.minimum(tl.cdiv(n_key, KEYS), n_split)
    maximum = float("-inf")
    total = 0.0
    mixed = tl.zeros([WIDTH], tl.float32)
    for start in range(0, n_part, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = split < n_part
        part = head * n_split + split
        part_maximum = tl.load(maxima + part, mask=there, other=float("-inf"))
        part_total = tl.load(totals + part, mask=there, other=0.0)
        x = tl.load(sums + part[:, None] * DV + d[None, :], mask=there[:, None] & (d < DV)[None, :], other=0.0)
        new = tl.maximum(maximum, tl.max(part_maximum, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(part_maximum - safe)
        decay = tl.exp2(maximum - safe)
        total = total * decay + tl.sum(weight * part_total, 0)
        mixed = mixed * decay + tl.sum(weight[:, None] * x, 0)
        maximum = new
    mixed /= tl.where(total > 0.0, total, 1.0)
    tl.store(out + head * DV + d, mixed, mask=d < DV)
    if QUANTIZE:
        if BY_HEAD:
            head = head % N_HEAD * (tl.num_programs(1) // N_HEAD) + head // N_HEAD
        first = tl.program_id(0) * (WIDTH // 16) + tl.arange(0, WIDTH // 16)
        mixed = tl.reshape(mixed, [WIDTH // 16, 16])
        scale, inverse = step_of(mixed)
        codes_of_run = rounded(mixed * inverse[:, None])
        store_run(codes, pairs, codes_of_run, scale, head * (DV // 16) + first, first < DV // 16)
