"""Triton device functions that turn quantized blocks into f32 values, one for each type.

Each takes a tile of blocks cut into `n_sub` runs of `width` neighbouring elements:
  p       uint8 pointers to the blocks' first bytes, `[n_block, 1, 1]`, of any alignment
  s       the index of the run within its block, `[1, n_sub, 1]`
  w       the index of the element within its run, `[1, 1, width]`
  table   int8 pointer to the type's codebook (codebooks.py), where it has one
and returns f32 `[n_block, n_sub, width]`. Fields shared by a block or a run are loaded with that smaller shape.

Blocks may start at any byte, so everything is loaded bytewise. Products are bracketed as in the GGUF reference,
so that with floating-point contraction off the results agree to the last bit. Layouts: the GGML block types.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels import codebooks
from moe_engine.kernels.quant_types import BY_NAME

# The width of a run. Elements of a run share a scale (or, for the grids, an index) and lie in consecutive bytes.
RUN_WIDTHS = {"F32": 1, "F16": 1, "BF16": 1}
RUN_WIDTHS |= dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "NVFP4", "IQ4_XS"), 16)
RUN_WIDTHS |= dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "TQ1_0"), 16)
RUN_WIDTHS |= dict.fromkeys(("Q8_0", "Q4_K", "Q5_K", "TQ2_0"), 32)
RUN_WIDTHS |= dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), 8)
RUN_WIDTHS |= dict.fromkeys(("IQ3_XXS", "IQ3_S"), 4)

_IQ4_LOW, _IQ4_HIGH = (tl.constexpr(w) for w in codebooks.codebook(BY_NAME["IQ4_NL"].id).ravel().view("<i8").tolist())
_TWO_127 = tl.constexpr(2.0**127)


@triton.jit
def _u8(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def _i8(p):
    return tl.load(p).to(tl.int8, bitcast=True).to(tl.int32)


@triton.jit
def _u16(p):
    return _u8(p) | (_u8(p + 1) << 8)


@triton.jit
def word_at(p):
    return _u16(p) | (_u16(p + 2) << 16)


@triton.jit
def _half(bits):
    """The value of f16 bits held in an int32."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half_at(p):
    return _half(_u16(p))


@triton.jit
def _nibble(p, high):
    """The low (high=0) or high (high=1) half of a byte."""
    return (_u8(p) >> (4 * high)) & 15


# Plain floats


@triton.jit
def f32(p, s, w):
    return word_at(p + 4 * (s + w)).to(tl.float32, bitcast=True)


@triton.jit
def f16(p, s, w):
    return half_at(p + 2 * (s + w))


@triton.jit
def bf16(p, s, w):
    return (_u16(p + 2 * (s + w)) << 16).to(tl.float32, bitcast=True)


# 32 elements a block: run 0 in the low nibbles, run 1 in the high ones


@triton.jit
def q4_0(p, s, w):
    return half_at(p) * (_nibble(p + 2 + w, s) - 8).to(tl.float32)


@triton.jit
def q4_1(p, s, w):
    return half_at(p) * _nibble(p + 4 + w, s).to(tl.float32) + half_at(p + 2)


@triton.jit
def _fifth_bit(p, s, w):
    """Bit `16 s + w` of the 32 at p, in place 4."""
    return ((_u16(p + 2 * s) >> w) & 1) << 4


@triton.jit
def q5_0(p, s, w):
    q = _nibble(p + 6 + w, s) | _fifth_bit(p + 2, s, w)
    return half_at(p) * (q - 16).to(tl.float32)


@triton.jit
def q5_1(p, s, w):
    q = _nibble(p + 8 + w, s) | _fifth_bit(p + 4, s, w)
    return half_at(p) * q.to(tl.float32) + half_at(p + 2)


@triton.jit
def q8_0(p, s, w):
    return half_at(p) * _i8(p + 2 + 32 * s + w).to(tl.float32)


@triton.jit
def iq4_value(q):
    """Entry q of the table of IQ4_NL and IQ4_XS: eight bytes a word, which is cheaper than a load."""
    word = tl.where(q < 8, _IQ4_LOW, _IQ4_HIGH) >> (8 * (q & 7))
    return word.to(tl.int8).to(tl.float32)


@triton.jit
def fp4_value(q):
    """Entry q of the table of MXFP4 and NVFP4, twice the E2M1 number, from its bits."""
    value = (((q & 7) << 22) | ((q & 8) << 28)).to(tl.float32, bitcast=True) * _TWO_127
    return value + 0.0  # the table has no -0


@triton.jit
def iq4_nl(p, s, w, table):
    return half_at(p) * iq4_value(_nibble(p + 2 + w, s))


@triton.jit
def mxfp4_scale(p):
    e = _u8(p)
    # 2^(e-128) from its bits: the two smallest are f32 subnormals
    return tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mxfp4(p, s, w, table):
    return mxfp4_scale(p) * fp4_value(_nibble(p + 1 + w, s))


@triton.jit
def nvfp4(p, s, w, table):
    x = _u8(p + s)
    exponent = (x >> 3) & 15
    mantissa = x & 7
    # Half of the unsigned E4M3 value; 0x7F is its NaN, read as zero
    normal = (((exponent + 119) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    d = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0009765625, normal)
    d = tl.where(x == 0x7F, 0.0, d)
    q = _nibble(p + 4 + 8 * s + w % 8, w // 8)
    return d * fp4_value(q)


# K types: 256 elements a block


@triton.jit
def q2_k(p, s, w):
    scale = _u8(p + s)
    q = (_u8(p + 16 + 32 * (s // 8) + 16 * (s % 2) + w) >> (2 * (s % 8 // 2))) & 3
    d = half_at(p + 80) * (scale & 15).to(tl.float32)
    m = half_at(p + 82) * (scale >> 4).to(tl.float32)
    return d * q.to(tl.float32) - m


@triton.jit
def q3_k(p, s, w):
    scale = _nibble(p + 96 + s % 8, s // 8) | (((_u8(p + 104 + s % 4) >> (2 * (s // 4))) & 3) << 4)
    low = (_u8(p + 32 + 32 * (s // 8) + 16 * (s % 2) + w) >> (2 * (s % 8 // 2))) & 3
    high = (_u8(p + 16 * (s % 2) + w) >> (s // 2)) & 1
    d = half_at(p + 108) * (scale - 32).to(tl.float32)
    return d * ((low | (high << 2)) - 4).to(tl.float32)


@triton.jit
def _scale_and_min(p, s, q):
    """Q4_K and Q5_K: d and dmin at p, then eight pairs of 6-bit factors packed in 12 bytes."""
    a = _u8(p + 4 + s % 4)
    b = _u8(p + 8 + s % 4)
    c = _u8(p + 12 + s % 4)
    scale = tl.where(s < 4, a & 63, (c & 15) | ((a >> 6) << 4))
    minimum = tl.where(s < 4, b & 63, (c >> 4) | ((b >> 6) << 4))
    d = half_at(p) * scale.to(tl.float32)
    m = half_at(p + 2) * minimum.to(tl.float32)
    return d * q.to(tl.float32) - m


@triton.jit
def q4_k(p, s, w):
    return _scale_and_min(p, s, _nibble(p + 16 + 32 * (s // 2) + w, s % 2))


@triton.jit
def q5_k(p, s, w):
    high = (_u8(p + 16 + w) >> s) & 1
    return _scale_and_min(p, s, _nibble(p + 48 + 32 * (s // 2) + w, s % 2) | (high << 4))


@triton.jit
def q6_k(p, s, w):
    low = _nibble(p + 64 * (s // 8) + 16 * (s % 4) + w, s // 4 % 2)
    high = (_u8(p + 128 + 32 * (s // 8) + 16 * (s % 2) + w) >> (2 * (s % 8 // 2))) & 3
    d = half_at(p + 208) * _i8(p + 192 + s).to(tl.float32)
    return d * ((low | (high << 4)) - 32).to(tl.float32)


# Ternary types


@triton.jit
def tq1_0(p, s, w):
    i = 16 * s + w
    # Base-3 digit k of a byte; three regions of 32, 16 and 4 bytes
    byte = tl.where(i < 160, i % 32, tl.where(i < 240, 32 + i % 16, 48 + i % 4))
    k = tl.where(i < 160, i // 32, tl.where(i < 240, (i - 160) // 16, (i - 240) // 4))
    power = tl.where(k == 0, 1, tl.where(k == 1, 3, tl.where(k == 2, 9, tl.where(k == 3, 27, 81))))
    digit = (((_u8(p + byte) * power) & 255) * 3) >> 8
    return half_at(p + 52) * (digit - 1).to(tl.float32)


@triton.jit
def tq2_0(p, s, w):
    q = (_u8(p + 32 * (s // 4) + w) >> (2 * (s % 4))) & 3
    return half_at(p + 64) * (q - 1).to(tl.float32)


# IQ types: an index stands for a run of 8 or 4 elements


@triton.jit
def _even_signs(code):
    """The 8 sign bits of a 7-bit code: the last one makes their number even."""
    parity = code ^ (code >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return code | ((parity & 1) << 7)


@triton.jit
def _signed_grid(db, entry, signs, w, first_sign):
    """db * grid value * sign; element w takes bit `first_sign + w`."""
    sign = 1 - 2 * ((signs >> (first_sign + w)) & 1)
    return db * tl.load(entry + w).to(tl.float32) * sign.to(tl.float32)


@triton.jit
def iq2_xxs(p, s, w, table):
    group = p + 2 + 8 * (s // 4)
    signs = _even_signs((word_at(group + 4) >> (7 * (s % 4))) & 127)
    db = half_at(p) * (0.5 + (_u8(group + 7) >> 4).to(tl.float32)) * 0.25
    return _signed_grid(db, table + 8 * _u8(group + s % 4), signs, w, 0)


@triton.jit
def iq2_xs(p, s, w, table):
    q = _u16(p + 2 + 2 * s)
    db = half_at(p) * (0.5 + _nibble(p + 66 + s // 4, s // 2 % 2).to(tl.float32)) * 0.25
    return _signed_grid(db, table + 8 * (q & 511), _even_signs(q >> 9), w, 0)


@triton.jit
def iq2_s(p, s, w, table):
    index = _u8(p + 2 + s) | (((_u8(p + 66 + s // 4) >> (2 * (s % 4))) & 3) << 8)
    db = half_at(p) * (0.5 + _nibble(p + 74 + s // 4, s // 2 % 2).to(tl.float32)) * 0.25
    return _signed_grid(db, table + 8 * index, _u8(p + 34 + s), w, 0)


@triton.jit
def iq3_xxs(p, s, w, table):
    word = word_at(p + 66 + 4 * (s // 8))
    signs = _even_signs((word >> (7 * (s // 2 % 4))) & 127)
    db = half_at(p) * (0.5 + ((word >> 28) & 15).to(tl.float32)) * 0.5
    return _signed_grid(db, table + 4 * _u8(p + 2 + s), signs, w, 4 * (s % 2))


@triton.jit
def iq3_s(p, s, w, table):
    index = _u8(p + 2 + s) | (((_u8(p + 66 + s // 8) >> (s % 8)) & 1) << 8)
    db = half_at(p) * (1 + 2 * _nibble(p + 106 + s // 16, s // 8 % 2)).to(tl.float32)
    return _signed_grid(db, table + 4 * index, _u8(p + 74 + s // 2), w, 4 * (s % 2))


@triton.jit
def iq1_s(p, s, w, table):
    high = _u16(p + 34 + 2 * (s // 4))
    index = _u8(p + 2 + s) | (((high >> (3 * (s % 4))) & 7) << 8)
    d = half_at(p) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
    delta = 0.125 - 0.25 * (high >> 15).to(tl.float32)
    return d * (tl.load(table + 8 * index + w).to(tl.float32) + delta)


@triton.jit
def iq1_m(p, s, w, table):
    high = _nibble(p + 32 + s // 2, s % 2)
    index = _u8(p + s) | ((high & 7) << 8)
    # The f16 scale is spread over the top nibbles of four words of 3-bit scales
    bits = (_u8(p + 49) >> 4) | (_u8(p + 51) & 240) | ((_u8(p + 53) & 240) << 4) | ((_u8(p + 55) & 240) << 8)
    scale = (_u16(p + 48 + 2 * (s // 8)) >> (3 * (s // 2 % 4))) & 7
    d = _half(bits) * (2 * scale + 1).to(tl.float32)
    delta = 0.125 - 0.25 * (high >> 3).to(tl.float32)
    return d * (tl.load(table + 8 * index + w).to(tl.float32) + delta)


@triton.jit
def iq4_xs(p, s, w, table):
    j = s // 2  # two runs, low and high nibbles, share a scale
    scale = _nibble(p + 4 + j // 2, j % 2) | (((_u16(p + 2) >> (2 * j)) & 3) << 4)
    d = half_at(p) * (scale - 32).to(tl.float32)
    return d * iq4_value(_nibble(p + 8 + 16 * j + w, s % 2))
