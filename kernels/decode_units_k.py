"""The units of decode_units.py for the types with 256 weights a block."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_runs import high, looked_up, low, run, run_min
from moe_engine.kernels.decode_words import half, load16, load_i8, load_u8, load_u16


@triton.jit
def _q4_k_factors(p, g, ALIGN: tl.constexpr):
    """Scales and minima of sub-blocks 2g and 2g + 1 of Q4_K and Q5_K, from the 16 bytes at p."""
    dm, s0, s1, s2 = load16(p, ALIGN)
    # Two neighbouring sub-blocks' bytes at once
    shift = 16 * (g % 2)
    s0, s1, s2 = s0 >> shift, s1 >> shift, s2 >> shift
    scales = tl.where(g < 2, s0 & 0x3F3F, (s2 & 0x0F0F) | ((s0 >> 2) & 0x3030))
    minima = tl.where(g < 2, s1 & 0x3F3F, ((s2 >> 4) & 0x0F0F) | ((s1 >> 2) & 0x3030))
    d = half(dm)
    m = half(dm >> 16)
    d0, d1 = d * (scales & 255).to(tl.float32), d * (scales >> 8).to(tl.float32)
    return d0, d1, m * (minima & 255).to(tl.float32), m * (minima >> 8).to(tl.float32)


@triton.jit
def q4_k(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 144 * (u // 8)
    g = u // 2 % 4
    d0, d1, m0, m1 = _q4_k_factors(p, g, ALIGN)
    a, b, c, e = load16(p + 16 + 16 * (u % 8), ALIGN)
    element = 64 * (u // 2) + 16 * (u % 2)
    y = run_min(low(a), low(b), low(c), low(e), d0, m0, x, pairs, element)
    return y + run_min(high(a), high(b), high(c), high(e), d1, m1, x, pairs, element + 32)


@triton.jit
def q5_k(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 176 * (u // 8)
    g = u // 2 % 4
    d0, d1, m0, m1 = _q4_k_factors(p, g, ALIGN)
    ha, hb, hc, he = load16(p + 16 + 16 * (u % 2), ALIGN)
    ha, hb, hc, he = ha >> (2 * g), hb >> (2 * g), hc >> (2 * g), he >> (2 * g)
    a, b, c, e = load16(p + 48 + 16 * (u % 8), ALIGN)
    element = 64 * (u // 2) + 16 * (u % 2)
    a0, b0 = low(a) | ((ha << 4) & 0x10101010), low(b) | ((hb << 4) & 0x10101010)
    c0, e0 = low(c) | ((hc << 4) & 0x10101010), low(e) | ((he << 4) & 0x10101010)
    y = run_min(a0, b0, c0, e0, d0, m0, x, pairs, element)
    a1, b1 = high(a) | ((ha << 3) & 0x10101010), high(b) | ((hb << 3) & 0x10101010)
    c1, e1 = high(c) | ((hc << 3) & 0x10101010), high(e) | ((he << 3) & 0x10101010)
    return y + run_min(a1, b1, c1, e1, d1, m1, x, pairs, element + 32)


@triton.jit
def q6_k(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 210 * (u // 4)
    c = u // 2 % 2
    i = u % 2
    d = half(load_u16(p + 208))
    scales = p + 192 + 8 * c + i
    h0, h1, h2, h3 = load16(p + 128 + 16 * (u % 4), 2)
    a0, a1, a2, a3 = load16(p + 64 * c + 16 * i, 2)
    element = 128 * (u // 2) + 16 * i
    q0, q1 = low(a0) | ((h0 << 4) & 0x30303030), low(a1) | ((h1 << 4) & 0x30303030)
    q2, q3 = low(a2) | ((h2 << 4) & 0x30303030), low(a3) | ((h3 << 4) & 0x30303030)
    y = run(q0, q1, q2, q3, d * load_i8(scales).to(tl.float32), 32, x, pairs, element)
    q0, q1 = high(a0) | (h0 & 0x30303030), high(a1) | (h1 & 0x30303030)
    q2, q3 = high(a2) | (h2 & 0x30303030), high(a3) | (h3 & 0x30303030)
    y += run(q0, q1, q2, q3, d * load_i8(scales + 4).to(tl.float32), 32, x, pairs, element + 64)
    a0, a1, a2, a3 = load16(p + 64 * c + 32 + 16 * i, 2)
    q0, q1 = low(a0) | ((h0 << 2) & 0x30303030), low(a1) | ((h1 << 2) & 0x30303030)
    q2, q3 = low(a2) | ((h2 << 2) & 0x30303030), low(a3) | ((h3 << 2) & 0x30303030)
    y += run(q0, q1, q2, q3, d * load_i8(scales + 2).to(tl.float32), 32, x, pairs, element + 32)
    q0, q1 = high(a0) | ((h0 >> 2) & 0x30303030), high(a1) | ((h1 >> 2) & 0x30303030)
    q2, q3 = high(a2) | ((h2 >> 2) & 0x30303030), high(a3) | ((h3 >> 2) & 0x30303030)
    return y + run(q0, q1, q2, q3, d * load_i8(scales + 6).to(tl.float32), 32, x, pairs, element + 96)


@triton.jit
def q2_k(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 84 * (u // 4)
    d = half(load_u16(p + 80))
    m = half(load_u16(p + 82))
    a, b, c, e = load16(p + 16 + 16 * (u % 4), ALIGN if ALIGN <= 4 else 4)
    scales = p + 8 * (u // 2 % 2) + u % 2
    element = 128 * (u // 2) + 16 * (u % 2)
    y = 0.0
    for f in tl.static_range(4):
        scale = load_u8(scales + 2 * f)
        q0, q1 = (a >> (2 * f)) & 0x03030303, (b >> (2 * f)) & 0x03030303
        q2, q3 = (c >> (2 * f)) & 0x03030303, (e >> (2 * f)) & 0x03030303
        minimum = m * (scale >> 4).to(tl.float32)
        y += run_min(q0, q1, q2, q3, d * (scale & 15).to(tl.float32), minimum, x, pairs, element + 32 * f)
    return y


@triton.jit
def q3_k(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 110 * (u // 4)
    half_block = u // 2 % 2
    i = u % 2
    d = half(load_u16(p + 108))
    ha, hb, hc, he = load16(p + 16 * i, 2)
    # Bit f of each byte is now the third bit of field f
    ha, hb, hc, he = ha >> (4 * half_block), hb >> (4 * half_block), hc >> (4 * half_block), he >> (4 * half_block)
    a, b, c, e = load16(p + 32 + 16 * (u % 4), 2)
    element = 128 * (u // 2) + 16 * i
    y = 0.0
    for f in tl.static_range(4):
        scale = (load_u8(p + 96 + i + 2 * f) >> (4 * half_block)) & 15
        top = load_u8(p + 104 + i + 2 * (f % 2)) >> (4 * half_block + 2 * (f // 2))
        scale = (scale | ((top & 3) << 4)) - 32
        q0 = ((a >> (2 * f)) & 0x03030303) | (((ha >> f) << 2) & 0x04040404)
        q1 = ((b >> (2 * f)) & 0x03030303) | (((hb >> f) << 2) & 0x04040404)
        q2 = ((c >> (2 * f)) & 0x03030303) | (((hc >> f) << 2) & 0x04040404)
        q3 = ((e >> (2 * f)) & 0x03030303) | (((he >> f) << 2) & 0x04040404)
        y += run(q0, q1, q2, q3, d * scale.to(tl.float32), 4, x, pairs, element + 32 * f)
    return y


@triton.jit
def tq2_0(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 66 * (u // 4)
    d = half(load_u16(p + 64))
    a, b, c, e = load16(p + 16 * (u % 4), 2)
    element = 128 * (u // 2) + 16 * (u % 2)
    y = 0.0
    for f in tl.static_range(4):
        q0, q1 = (a >> (2 * f)) & 0x03030303, (b >> (2 * f)) & 0x03030303
        q2, q3 = (c >> (2 * f)) & 0x03030303, (e >> (2 * f)) & 0x03030303
        y += run(q0, q1, q2, q3, d, 1, x, pairs, element + 32 * f)
    return y


@triton.jit
def iq4_xs(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 136 * (u // 8)
    j = u % 8
    a, b, c, e = load16(p + 8 + 16 * j, ALIGN if ALIGN <= 8 else 8)
    low = (load_u8(p + 4 + j // 2) >> (4 * (j % 2))) & 15
    scale = (low | (((load_u16(p + 2) >> (2 * j)) & 3) << 4)) - 32
    return looked_up(a, b, c, e, half(load_u16(p)) * scale.to(tl.float32), x, pairs, 32 * u)
