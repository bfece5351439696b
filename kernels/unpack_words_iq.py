"""The functions of unpack_words.py for the IQ types.

A lane's run g (0 to 7) are elements 32 g + 8 lane and following; IQ4_XS has an order of its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import triton
import triton.language as tl

from moe_engine.kernels import codebooks
from moe_engine.kernels.decode_words import look_up
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.kernels.unpack_words import (
    codes,
    field,
    half,
    load2,
    load4,
    load8,
    load_eight,
    load_four,
    moved,
    write,
)

# The table of IQ4_XS, plus 128, as words
_IQ4 = (codebooks.codebook(BY_NAME["IQ4_XS"].id).ravel().astype(np.int16) + 128).astype(np.uint8)
_T0, _T1, _T2, _T3 = (tl.constexpr(word) for word in _IQ4.view("<u4").tolist())


@triton.jit
def _iq4(w):
    low, high = look_up(w.to(tl.int32)[:, None, None], _T0, _T1, _T2, _T3)
    return tl.reshape(low, w.shape).to(tl.uint32), tl.reshape(high, w.shape).to(tl.uint32)


@triton.jit
def iq4_xs(p, lane, at, mask, table, ALIGN: tl.constexpr):
    words = load_four(p + 8 + 8 * lane, 32, 8, ALIGN)
    head, scales = load8(p, ALIGN)
    d = half(head)
    odd = lane // 2  # a lane's 8 bytes are codes of one sub-block: an even or an odd one
    scales >>= 4 * odd
    upper = head >> (16 + 2 * odd)
    at += 32 * odd + 8 * (lane % 2)
    for j in tl.static_range(4):
        a, b = words[j]
        a_low, a_high = _iq4(a)
        b_low, b_high = _iq4(b)
        scale = (d * field(moved(scales, -8 * j, 15) | moved(upper, 4 - 4 * j, 48), 0, 6, 32))[:, None]
        write(at + 64 * j, scale * codes(a_low, b_low, 0, 8, 128), mask)
        write(at + 64 * j + 16, scale * codes(a_high, b_high, 0, 8, 128), mask)


@triton.jit
def _grid4(table, index):
    return tl.load(table.to(tl.pointer_type(tl.uint32)) + index)


@triton.jit
def _grid8(table, index):
    return tl.split(tl.load(table.to(tl.pointer_type(tl.uint32)) + 2 * index[:, None] + tl.arange(0, 2)[None, :]))


@triton.jit
def _even_signs(code):
    """The 8 sign bits of a 7-bit code, which may have others above it: the last one makes their number even."""
    code &= 127
    parity = code ^ (code >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return code | ((parity & 1) << 7)


@triton.jit
def _signed(y, signs):
    """y `[n_lane, 8]`, negated where the bit of `signs` is set."""
    flip = (signs[:, None] << (31 - tl.arange(0, 8)).to(tl.uint32)[None, :]) & 0x80000000
    return (y.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def iq2_xxs(p, lane, at, mask, table, ALIGN: tl.constexpr):
    words = load_eight(p + 2, 8, 8, ALIGN)
    d = half(load2(p, ALIGN))
    at += 8 * lane
    for g in tl.static_range(8):
        indices, word = words[g]
        db = d * (0.5 + field(word, 28, 4)) * 0.25
        a, b = _grid8(table, (indices >> (8 * lane)) & 255)
        write(at + 32 * g, _signed(db[:, None] * codes(a, b, 0, 6), _even_signs(word >> (7 * lane))), mask)


@triton.jit
def iq2_xs(p, lane, at, mask, table, ALIGN: tl.constexpr):
    words = load_eight(p + 2 + 2 * lane, 8, 2, ALIGN)
    scales = load8(p + 66, ALIGN)
    d = half(load2(p, ALIGN))
    at += 8 * lane
    for g in tl.static_range(8):
        db = d * (0.5 + field(scales[g // 4] >> (lane // 2 * 4), 8 * (g % 4), 4)) * 0.25
        a, b = _grid8(table, words[g] & 511)
        write(at + 32 * g, _signed(db[:, None] * codes(a, b, 0, 6), _even_signs(words[g] >> 9)), mask)


@triton.jit
def iq2_s(p, lane, at, mask, table, ALIGN: tl.constexpr):
    indices = load_eight(p + 2 + lane, 4, 1, ALIGN)
    signs = load_eight(p + 34 + lane, 4, 1, ALIGN)
    upper = load8(p + 66, ALIGN)
    scales = load8(p + 74, ALIGN)
    d = half(load2(p, ALIGN))
    at += 8 * lane
    for g in tl.static_range(8):
        index = indices[g] | moved(upper[g // 4] >> (2 * lane), 8 - 8 * (g % 4), 0x300)
        db = d * (0.5 + field(scales[g // 4] >> (lane // 2 * 4), 8 * (g % 4), 4)) * 0.25
        a, b = _grid8(table, index)
        write(at + 32 * g, _signed(db[:, None] * codes(a, b, 0, 6), signs[g]), mask)


@triton.jit
def iq3_xxs(p, lane, at, mask, table, ALIGN: tl.constexpr):
    indices = load_eight(p + 2 + 2 * lane, 8, 2, ALIGN)
    words = load_eight(p + 66, 4, 4, ALIGN)
    d = half(load2(p, ALIGN))
    at += 8 * lane
    for g in tl.static_range(8):
        db = d * (0.5 + field(words[g], 28, 4)) * 0.5
        y = db[:, None] * codes(_grid4(table, indices[g] & 255), _grid4(table, indices[g] >> 8), 0, 6)
        write(at + 32 * g, _signed(y, _even_signs(words[g] >> (7 * lane))), mask)


@triton.jit
def iq3_s(p, lane, at, mask, table, ALIGN: tl.constexpr):
    indices = load_eight(p + 2 + 2 * lane, 8, 2, ALIGN)
    signs = load_eight(p + 74 + lane, 4, 1, ALIGN)
    upper = load8(p + 66, ALIGN)
    scales = load4(p + 106, ALIGN)
    d = half(load2(p, ALIGN))
    at += 8 * lane
    for g in tl.static_range(8):
        bits = upper[g // 4] >> (2 * lane)
        a = _grid4(table, (indices[g] & 255) | moved(bits, 8 - 8 * (g % 4), 256))
        b = _grid4(table, (indices[g] >> 8) | moved(bits, 7 - 8 * (g % 4), 256))
        db = d * (1 + 2 * field(scales, 4 * g, 4))
        write(at + 32 * g, _signed(db[:, None] * codes(a, b, 0, 4), signs[g]), mask)


@triton.jit
def _ternary(table, index, d, delta):
    a, b = _grid8(table, index)
    return d[:, None] * (codes(a ^ 0x80808080, b ^ 0x80808080, 0, 8, 128) + delta[:, None])


@triton.jit
def iq1_s(p, lane, at, mask, table, ALIGN: tl.constexpr):
    indices = load_eight(p + 2 + lane, 4, 1, ALIGN)
    words = load_eight(p + 34, 2, 2, ALIGN)
    d = half(load2(p, ALIGN))
    at += 8 * lane
    for g in tl.static_range(8):
        index = indices[g] | (((words[g] >> (3 * lane)) & 7) << 8)
        delta = 0.125 - 0.25 * field(words[g], 15, 1)
        write(at + 32 * g, _ternary(table, index, d * (2 * field(words[g], 12, 3) + 1), delta), mask)


@triton.jit
def iq1_m(p, lane, at, mask, table, ALIGN: tl.constexpr):
    indices = load_eight(p + lane, 4, 1, ALIGN)
    words = load_eight(p + 32, 2, 2, ALIGN)
    scales = load8(p + 48, ALIGN)
    s, t = scales
    # The f16 scale is spread over the top nibbles of four 16-bit words of 3-bit scales
    d = half(moved(s, -12, 0xF) | moved(s, -24, 0xF0) | moved(t, -4, 0xF00) | moved(t, -16, 0xF000))
    at += 8 * lane
    for g in tl.static_range(8):
        upper = words[g] >> (4 * lane)
        delta = 0.125 - 0.25 * field(upper, 3, 1)
        scale = field(scales[g // 4] >> (lane // 2 * 3), 16 * (g // 2 % 2) + 6 * (g % 2), 3)
        write(at + 32 * g, _ternary(table, indices[g] | ((upper & 7) << 8), d * (2 * scale + 1), delta), mask)
