"""The functions of unpack_words.py for the K types and TQ2_0.

A lane takes 8 bytes of every 32 of the codes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.unpack_words import codes, field, half, load2, load4, load8, load_four, moved, write


@triton.jit
def _low(w):
    return moved(w, 0, 0x0F0F0F0F)


@triton.jit
def _high(w):
    return moved(w, -4, 0x0F0F0F0F)


@triton.jit
def _k_factors(p, ALIGN: tl.constexpr):
    """Q4_K and Q5_K: d, dmin, and as bytes the scales and the minima of sub-blocks 0 to 3, then those of 4 to 7."""
    dm, a = load8(p, ALIGN)
    b, c = load8(p + 8, ALIGN)
    scales = _low(c) | moved(a, -2, 0x30303030)
    minima = _high(c) | moved(b, -2, 0x30303030)
    return half(dm), half(dm >> 16), a & 0x3F3F3F3F, b & 0x3F3F3F3F, scales, minima


@triton.jit
def _minus_min(q, d, m, scales, minima, K: tl.constexpr):
    return (d * field(scales, 8 * K, 6))[:, None] * q - (m * field(minima, 8 * K, 6))[:, None]


@triton.jit
def q4_k(p, lane, at, mask, ALIGN: tl.constexpr):
    words = load_four(p + 16 + 8 * lane, 32, 8, ALIGN)
    d, m, scales, minima, scales_4, minima_4 = _k_factors(p, ALIGN)
    at += 8 * lane
    for j in tl.static_range(4):
        if j == 2:
            scales = scales_4
            minima = minima_4
        a, b = words[j]
        write(at + 64 * j, _minus_min(codes(a, b, 0, 4), d, m, scales, minima, 2 * (j % 2)), mask)
        write(at + 64 * j + 32, _minus_min(codes(a, b, 4, 4), d, m, scales, minima, 2 * (j % 2) + 1), mask)


@triton.jit
def q5_k(p, lane, at, mask, ALIGN: tl.constexpr):
    words = load_four(p + 48 + 8 * lane, 32, 8, ALIGN)
    h, i = load8(p + 16 + 8 * lane, ALIGN)
    d, m, scales, minima, scales_4, minima_4 = _k_factors(p, ALIGN)
    at += 8 * lane
    for j in tl.static_range(4):
        if j == 2:
            scales = scales_4
            minima = minima_4
        a, b = words[j]
        low = codes(_low(a) | moved(h, 4 - 2 * j, 0x10101010), _low(b) | moved(i, 4 - 2 * j, 0x10101010), 0, 5)
        high = codes(_high(a) | moved(h, 3 - 2 * j, 0x10101010), _high(b) | moved(i, 3 - 2 * j, 0x10101010), 0, 5)
        write(at + 64 * j, _minus_min(low, d, m, scales, minima, 2 * (j % 2)), mask)
        write(at + 64 * j + 32, _minus_min(high, d, m, scales, minima, 2 * (j % 2) + 1), mask)


@triton.jit
def q6_k(p, lane, at, mask, ALIGN: tl.constexpr):
    words = load_four(p + 8 * lane, 32, 8, ALIGN)
    highest = load8(p + 128 + 8 * lane, ALIGN), load8(p + 160 + 8 * lane, ALIGN)
    scales = load8(p + 192, ALIGN), load8(p + 200, ALIGN)
    d = half(load2(p + 208, ALIGN))
    at += 8 * lane
    for c in tl.static_range(2):
        h, i = highest[c]
        s, t = scales[c]
        # Signed bytes, offset by 128; a lane's are those of even or of odd index
        s = (s ^ 0x80808080) >> (lane // 2 * 8)
        t = (t ^ 0x80808080) >> (lane // 2 * 8)
        for r in tl.static_range(2):
            a, b = words[2 * c + r]
            low = codes(_low(a) | moved(h, 4 - 2 * r, 0x30303030), _low(b) | moved(i, 4 - 2 * r, 0x30303030), 0, 6, 32)
            high = codes(_high(a) | moved(h, -2 * r, 0x30303030), _high(b) | moved(i, -2 * r, 0x30303030), 0, 6, 32)
            write(at + 128 * c + 32 * r, (d * field(s, 16 * r, 8, 128))[:, None] * low, mask)
            write(at + 128 * c + 32 * r + 64, (d * field(t, 16 * r, 8, 128))[:, None] * high, mask)


@triton.jit
def q2_k(p, lane, at, mask, ALIGN: tl.constexpr):
    words = load8(p + 16 + 8 * lane, ALIGN), load8(p + 48 + 8 * lane, ALIGN)
    factors = load_four(p, 4, 4, ALIGN)
    dm = load4(p + 80, ALIGN)
    d = half(dm)
    m = half(dm >> 16)
    at += 8 * lane
    for c in tl.static_range(2):
        a, b = words[c]
        for r in tl.static_range(4):
            factor = factors[2 * c + r // 2] >> (lane // 2 * 8)
            y = (d * field(factor, 16 * (r % 2), 4))[:, None] * codes(a, b, 2 * r, 2)
            write(at + 128 * c + 32 * r, y - (m * field(factor, 16 * (r % 2) + 4, 4))[:, None], mask)


@triton.jit
def q3_k(p, lane, at, mask, ALIGN: tl.constexpr):
    words = load8(p + 32 + 8 * lane, ALIGN), load8(p + 64 + 8 * lane, ALIGN)
    h, i = load8(p + 8 * lane, ALIGN)
    lower = load8(p + 96, ALIGN)
    upper = load4(p + 104, ALIGN)
    d = half(load2(p + 108, ALIGN))
    at += 8 * lane
    for c in tl.static_range(2):
        a, b = words[c]
        for r in tl.static_range(4):
            scales = moved(lower[r // 2], -4 * c, 0x0F0F0F0F) | moved(upper, 4 - 4 * c - r // 2 * 2, 0x30303030)
            scale = field(scales >> (lane // 2 * 8), 16 * (r % 2), 6, 32)
            q = codes(
                moved(a, -2 * r, 0x03030303) | moved(h, 2 - 4 * c - r, 0x04040404),
                moved(b, -2 * r, 0x03030303) | moved(i, 2 - 4 * c - r, 0x04040404),
                0,
                3,
                4,
            )
            write(at + 128 * c + 32 * r, (d * scale)[:, None] * q, mask)


@triton.jit
def tq2_0(p, lane, at, mask, ALIGN: tl.constexpr):
    words = load8(p + 8 * lane, ALIGN), load8(p + 32 + 8 * lane, ALIGN)
    d = half(load2(p + 64, ALIGN))
    at += 8 * lane
    for c in tl.static_range(2):
        a, b = words[c]
        for r in tl.static_range(4):
            write(at + 128 * c + 32 * r, d[:, None] * codes(a, b, 2 * r, 2, 1), mask)
