"""The Triton kernels that `norm_rope` launches: RMSNorm, q/k norm with rotation, writes to the KV cache."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_activations_kernel import rounded, step_of, store_run
from moe_engine.kernels.decode_overlap import let_next_kernel_start, wait_for_previous_kernel
from moe_engine.kernels.dequantize_kernel import round_to
from moe_engine.kernels.launch import launched


@launched
@triton.jit
def rms_norm_kernel(
    x,
    weight,
    out,
    codes,
    pairs,
    n,
    x_stride,
    eps,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program t norms row t."""
    lane = tl.arange(0, BLOCK)
    inside = lane < n
    w = tl.load(weight + lane, mask=inside, other=0.0)
    row = tl.program_id(0).to(tl.int64) + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    v = tl.load(x + row * x_stride + lane, mask=inside, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / n + eps) * w
    tl.store(out + row * n + lane, round_to(v, out.dtype.element_ty), mask=inside)
    if QUANTIZE:
        v = tl.reshape(v, [BLOCK // 16, 16])
        scale, inverse = step_of(v)
        run = tl.arange(0, BLOCK // 16)
        store_run(codes, pairs, rounded(v * inverse[:, None]), scale, row * (n // 16) + run, run < n // 16)


@triton.jit
def _head(
    x,
    bias,
    weight,
    cos,
    sin,
    position,
    eps,
    lane,
    D: tl.constexpr,
    N_NORM: tl.constexpr,
    ROT_START: tl.constexpr,
    N_ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The D values at `x`, plus bias, normed over the first N_NORM, N_ROT of them from ROT_START rotated: f32.

    Each lane also computes its partner, from a second load of the same cache lines.
    """
    inside = lane < D
    v = tl.load(x + lane, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + lane, mask=inside, other=0.0)
    inverse = 1.0
    if N_NORM > 0:
        normed = lane < N_NORM
        inverse = tl.rsqrt(tl.sum(tl.where(normed, v * v, 0.0), 0) / N_NORM + eps)
        v = tl.where(normed, v * inverse * tl.load(weight + lane, mask=normed, other=0.0), v)
    if N_ROT > 0:
        HALF: tl.constexpr = N_ROT // 2
        r = lane - ROT_START
        rotated = (r >= 0) & (r < N_ROT)
        if INTERLEAVED:
            partner = ROT_START + (r ^ 1)
            pair = r >> 1
            first = (r & 1) == 0
        else:
            first = r < HALF
            partner = tl.where(first, lane + HALF, lane - HALF)
            pair = tl.where(first, r, r - HALF)
        u = tl.load(x + partner, mask=rotated, other=0.0).to(tl.float32)
        if HAS_BIAS:
            u += tl.load(bias + partner, mask=rotated, other=0.0)
        if N_NORM > ROT_START:
            normed = rotated & (partner < N_NORM)
            u = tl.where(normed, u * inverse * tl.load(weight + partner, mask=normed, other=0.0), u)
        c = tl.load(cos + position * HALF + pair, mask=rotated, other=1.0)
        s = tl.load(sin + position * HALF + pair, mask=rotated, other=0.0)
        v = v * c + tl.where(first, -u, u) * s
    return v


@triton.jit
def _store_row(values, scales, index, v, D: tl.constexpr, BLOCK: tl.constexpr, QUANTIZED: tl.constexpr):
    """Writes v (zero beyond D) as row `index` of a cache of rows of D values."""
    if QUANTIZED:
        blocks = tl.reshape(v, [BLOCK // 32, 32])
        scale = tl.div_rn(tl.max(tl.abs(blocks), 1), 127.0)
        inverse = tl.where(scale > 0.0, tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)), 0.0)
        scaled = blocks * inverse[:, None]
        whole = tl.floor(tl.abs(scaled) + 0.5)  # halves away from zero, as ggml rounds
        b = tl.arange(0, BLOCK // 32)
        lane = b[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(values + index * D + lane, tl.where(scaled < 0.0, -whole, whole).to(tl.int8), mask=lane < D)
        tl.store(scales + index * (D // 32) + b, scale.to(tl.float16), mask=b < D // 32)
    else:
        lane = tl.arange(0, BLOCK)
        tl.store(values + index * D + lane, round_to(v, values.dtype.element_ty), mask=lane < D)


@launched
@triton.jit
def qk_kernel(
    q,
    k,
    v,
    q_out,
    k_values,
    k_scales,
    v_values,
    v_scales,
    bias,
    q_weight,
    k_weight,
    cos,
    sin,
    positions,
    q_stride,
    k_stride,
    v_stride,
    capacity,
    eps,
    N_HEAD: tl.constexpr,
    N_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    N_NORM: tl.constexpr,
    N_ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    TOKENS: tl.constexpr,
    PER_POSITION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (h, t): query head h of token t, then the key heads, then the value heads."""
    h = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64) + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    lane = tl.arange(0, BLOCK)
    position = tl.load(positions + t // PER_POSITION).to(tl.int64) + t % PER_POSITION
    valid = (position >= 0) & (position < capacity)
    position = tl.where(valid, position, 0)
    if h < N_HEAD:
        y = _head(
            q + t * q_stride + h * D, bias + h * D, q_weight, cos, sin, position, eps, lane,
            D, N_NORM, 0, N_ROT, INTERLEAVED, HAS_BIAS,
        )  # fmt: skip
        tl.store(q_out + (t * N_HEAD + h) * D + lane, round_to(y, q_out.dtype.element_ty), mask=lane < D)
    elif valid:
        row = (t // TOKENS) * capacity + position
        if h < N_HEAD + N_KV:
            head = h - N_HEAD
            y = _head(
                k + t * k_stride + head * D, bias + h * D, k_weight, cos, sin, position, eps, lane,
                D, N_NORM, 0, N_ROT, INTERLEAVED, HAS_BIAS,
            )  # fmt: skip
            _store_row(k_values, k_scales, row * N_KV + head, y, D, BLOCK, QUANTIZED)
        else:
            head = h - N_HEAD - N_KV
            y = _head(
                v + t * v_stride + head * D, bias + h * D, k_weight, cos, sin, position, eps, lane,
                D, 0, 0, 0, INTERLEAVED, HAS_BIAS,
            )  # fmt: skip
            _store_row(v_values, v_scales, row * N_KV + head, y, D, BLOCK, QUANTIZED)


@launched
@triton.jit
def latent_kernel(
    q,
    kv,
    q_nope,
    q_out,
    codes,
    pairs,
    values,
    scales,
    weight,
    cos,
    sin,
    positions,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    kv_stride,
    nope_token_stride,
    nope_head_stride,
    capacity,
    eps,
    N_HEAD: tl.constexpr,
    KV_LORA: tl.constexpr,
    N_ROT: tl.constexpr,
    N_NOPE: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    TOKENS: tl.constexpr,
    PER_POSITION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (h, t): query head h of token t, its rotated part and the 8-bit form of the other one; the last h is the
    latent and the shared key.
    """
    h = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64) + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    position = tl.load(positions + t // PER_POSITION).to(tl.int64) + t % PER_POSITION
    valid = (position >= 0) & (position < capacity)
    position = tl.where(valid, position, 0)
    if h < N_HEAD:
        lane = tl.arange(0, Q_BLOCK)
        y = _head(
            q + t * q_token_stride + h * q_head_stride, weight, weight, cos, sin, position, eps, lane,
            N_ROT, 0, 0, N_ROT, True, False,
        )  # fmt: skip
        out = q_out + t * out_token_stride + h * out_head_stride + lane
        tl.store(out, round_to(y, q_out.dtype.element_ty), mask=lane < N_ROT)
        if N_NOPE > 0:
            run = tl.arange(0, NOPE_BLOCK // 16)
            inside = run < N_NOPE // 16
            source = q_nope + t * nope_token_stride + h * nope_head_stride + run[:, None] * 16
            x = tl.load(source + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
            scale, inverse = step_of(x)
            first = (h * tl.num_programs(1) + t) * (N_NOPE // 16)
            store_run(codes, pairs, rounded(x * inverse[:, None]), scale, first + run, inside)
    elif valid:
        lane = tl.arange(0, KV_BLOCK)
        D: tl.constexpr = KV_LORA + N_ROT
        y = _head(
            kv + t * kv_stride, weight, weight, cos, sin, position, eps, lane,
            D, KV_LORA, KV_LORA, N_ROT, True, False,
        )  # fmt: skip
        _store_row(values, scales, (t // TOKENS) * capacity + position, y, D, KV_BLOCK, QUANTIZED)
