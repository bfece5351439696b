"""Device functions that multiply quantized weights by 8-bit activations, one for each type with a fast path.

A unit is what a lane takes at once: one or two 16-byte loads of codes, 16, 32 or 64 weights of one row. It is made of
runs of 16 neighbouring weights that share a scale (and a minimum). Activations are quantized in runs of 16 too, so a
run costs four dp4a and one scaling. Each function takes
  row       uint8 pointers to the rows' first bytes, `[n_row, 1, n_unit]` or `[n_row, 1, 1]`, multiples of ALIGN
  u         the unit's index within its row, `[1, 1, n_unit]`
  x, pairs  the tokens' activations, `[1, n_token, n_unit]` or `[1, n_token, 1]`: pointers to int8 codes, and to
            (scale, scale times the sum of the codes) of each run in f32
and returns f32 `[n_row, n_token, n_unit]`. Layouts: the GGML block types.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels import decode_units_k as k
from moe_engine.kernels.codebooks import codebook
from moe_engine.kernels.decode_runs import high, looked_up, low, run, run_min
from moe_engine.kernels.decode_words import half, load16, load_u8, load_u16, look_up
from moe_engine.kernels.quant_types import BY_NAME

# The weights of a unit
UNIT_SIZES = dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "NVFP4", "Q4_K", "Q5_K", "IQ4_XS"), 32)
UNIT_SIZES |= dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "TQ2_0"), 64)
UNIT_SIZES |= {"Q8_0": 16}

_E2M1 = codebook(BY_NAME["MXFP4"].id).ravel().view("<u4").tolist()
_E0, _E1, _E2, _E3 = (tl.constexpr(word) for word in _E2M1)


# 32 elements a block: low nibbles are one run, high nibbles the other


@triton.jit
def q4_0(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 18 * u
    d = half(load_u16(p))
    a, b, c, e = load16(p + 2, 2)
    y = run(low(a), low(b), low(c), low(e), d, 8, x, pairs, 32 * u)
    return y + run(high(a), high(b), high(c), high(e), d, 8, x, pairs, 32 * u + 16)


@triton.jit
def q4_1(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 20 * u
    d = half(load_u16(p))
    m = -half(load_u16(p + 2))
    a, b, c, e = load16(p + 4, ALIGN if ALIGN <= 4 else 4)
    y = run_min(low(a), low(b), low(c), low(e), d, m, x, pairs, 32 * u)
    return y + run_min(high(a), high(b), high(c), high(e), d, m, x, pairs, 32 * u + 16)


@triton.jit
def _fifth(bits, FIRST: tl.constexpr):
    """Bits FIRST to FIRST + 3 spread over four bytes, each in place 4."""
    return (((bits >> FIRST) & 15) * 0x02040810) & 0x10101010


@triton.jit
def q5_0(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 22 * u
    d = half(load_u16(p))
    h = load_u16(p + 2)
    g = load_u16(p + 4)
    a, b, c, e = load16(p + 6, 2)
    a0, b0, c0, e0 = low(a) | _fifth(h, 0), low(b) | _fifth(h, 4), low(c) | _fifth(h, 8), low(e) | _fifth(h, 12)
    y = run(a0, b0, c0, e0, d, 16, x, pairs, 32 * u)
    a1, b1, c1, e1 = high(a) | _fifth(g, 0), high(b) | _fifth(g, 4), high(c) | _fifth(g, 8), high(e) | _fifth(g, 12)
    return y + run(a1, b1, c1, e1, d, 16, x, pairs, 32 * u + 16)


@triton.jit
def q5_1(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 24 * u
    d = half(load_u16(p))
    m = -half(load_u16(p + 2))
    h = load_u16(p + 4)
    g = load_u16(p + 6)
    a, b, c, e = load16(p + 8, ALIGN if ALIGN <= 8 else 8)
    a0, b0, c0, e0 = low(a) | _fifth(h, 0), low(b) | _fifth(h, 4), low(c) | _fifth(h, 8), low(e) | _fifth(h, 12)
    y = run_min(a0, b0, c0, e0, d, m, x, pairs, 32 * u)
    a1, b1, c1, e1 = high(a) | _fifth(g, 0), high(b) | _fifth(g, 4), high(c) | _fifth(g, 8), high(e) | _fifth(g, 12)
    return y + run_min(a1, b1, c1, e1, d, m, x, pairs, 32 * u + 16)


@triton.jit
def q8_0(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 34 * (u // 2)
    d = half(load_u16(p))
    # Half a block a unit: loads of neighbouring lanes then touch few cache lines
    a, b, c, e = load16(p + 2 + 16 * (u % 2), 2)
    return run(a, b, c, e, d, 0, x, pairs, 16 * u)


@triton.jit
def iq4_nl(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 18 * u
    a, b, c, e = load16(p + 2, 2)
    return looked_up(a, b, c, e, half(load_u16(p)), x, pairs, 32 * u)


@triton.jit
def mxfp4(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 17 * u
    a, b, c, e = load16(p + 1, 1)
    exponent = load_u8(p)
    # 2^(exponent - 128) from its bits: the two smallest are f32 subnormals
    bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
    scale = bits.to(tl.float32, bitcast=True)
    a0, a1 = look_up(a, _E0, _E1, _E2, _E3)
    b0, b1 = look_up(b, _E0, _E1, _E2, _E3)
    c0, c1 = look_up(c, _E0, _E1, _E2, _E3)
    e0, e1 = look_up(e, _E0, _E1, _E2, _E3)
    y = run(a0, b0, c0, e0, scale, 0, x, pairs, 32 * u)
    return y + run(a1, b1, c1, e1, scale, 0, x, pairs, 32 * u + 16)


@triton.jit
def _unsigned_e4m3(x):
    """Half of an unsigned E4M3 value, for the doubled table; 0x7F, its NaN, reads as zero."""
    exponent = (x >> 3) & 15
    mantissa = x & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0009765625, normal)
    return tl.where(x == 0x7F, 0.0, value)


@triton.jit
def nvfp4(row, u, x, pairs, ALIGN: tl.constexpr):
    p = row + 36 * (u // 2)
    half_block = u % 2
    a, b, c, e = load16(p + 4 + 16 * half_block, ALIGN if ALIGN <= 4 else 4)
    a0, a1 = look_up(a, _E0, _E1, _E2, _E3)
    b0, b1 = look_up(b, _E0, _E1, _E2, _E3)
    c0, c1 = look_up(c, _E0, _E1, _E2, _E3)
    e0, e1 = look_up(e, _E0, _E1, _E2, _E3)
    # A run is the low, then the high nibbles of eight bytes
    y = run(a0, b0, a1, b1, _unsigned_e4m3(load_u8(p + 2 * half_block)), 0, x, pairs, 32 * u)
    return y + run(c0, e0, c1, e1, _unsigned_e4m3(load_u8(p + 2 * half_block + 1)), 0, x, pairs, 32 * u + 16)


@triton.jit
def unit_dot(row, u, x, pairs, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The products of a tile of units of the type named TYPE."""
    if TYPE == "Q4_0":
        return q4_0(row, u, x, pairs, ALIGN)
    elif TYPE == "Q4_1":
        return q4_1(row, u, x, pairs, ALIGN)
    elif TYPE == "Q5_0":
        return q5_0(row, u, x, pairs, ALIGN)
    elif TYPE == "Q5_1":
        return q5_1(row, u, x, pairs, ALIGN)
    elif TYPE == "Q8_0":
        return q8_0(row, u, x, pairs, ALIGN)
    elif TYPE == "IQ4_NL":
        return iq4_nl(row, u, x, pairs, ALIGN)
    elif TYPE == "MXFP4":
        return mxfp4(row, u, x, pairs, ALIGN)
    elif TYPE == "NVFP4":
        return nvfp4(row, u, x, pairs, ALIGN)
    elif TYPE == "Q2_K":
        return k.q2_k(row, u, x, pairs, ALIGN)
    elif TYPE == "Q3_K":
        return k.q3_k(row, u, x, pairs, ALIGN)
    elif TYPE == "Q4_K":
        return k.q4_k(row, u, x, pairs, ALIGN)
    elif TYPE == "Q5_K":
        return k.q5_k(row, u, x, pairs, ALIGN)
    elif TYPE == "Q6_K":
        return k.q6_k(row, u, x, pairs, ALIGN)
    elif TYPE == "TQ2_0":
        return k.tq2_0(row, u, x, pairs, ALIGN)
    else:
        tl.static_assert(TYPE == "IQ4_XS")
        return k.iq4_xs(row, u, x, pairs, ALIGN)
