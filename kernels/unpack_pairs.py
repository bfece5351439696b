"""Triton device functions that turn blocks of 32 with 4-bit fields into f32 values, two for each byte loaded.

Like unpack.py, with the same results to the last bit, but a tile consists of a block's bytes of codes:
  p     uint8 pointers to the blocks' first bytes, `[n_block, 1, 1]`
  w     the index of the byte, `[1, 1, 16]`
Each returns two f32 tiles `[n_block, 1, 16]`: the low nibbles are elements w, the high ones elements 16 + w.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels import unpack

PAIR_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")


@triton.jit
def _split(p):
    byte = tl.load(p).to(tl.int32)
    return byte & 15, byte >> 4


@triton.jit
def _q4_0(p, w):
    low, high = _split(p + 2 + w)
    d = unpack.half_at(p)
    return d * (low - 8).to(tl.float32), d * (high - 8).to(tl.float32)


@triton.jit
def _q4_1(p, w):
    low, high = _split(p + 4 + w)
    d = unpack.half_at(p)
    m = unpack.half_at(p + 2)
    return d * low.to(tl.float32) + m, d * high.to(tl.float32) + m


@triton.jit
def _q5_0(p, w):
    low, high = _split(p + 6 + w)
    bits = unpack.word_at(p + 2) >> w
    low |= (bits & 1) << 4
    high |= ((bits >> 16) & 1) << 4
    d = unpack.half_at(p)
    return d * (low - 16).to(tl.float32), d * (high - 16).to(tl.float32)


@triton.jit
def _q5_1(p, w):
    low, high = _split(p + 8 + w)
    bits = unpack.word_at(p + 4) >> w
    low |= (bits & 1) << 4
    high |= ((bits >> 16) & 1) << 4
    d = unpack.half_at(p)
    m = unpack.half_at(p + 2)
    return d * low.to(tl.float32) + m, d * high.to(tl.float32) + m


@triton.jit
def _iq4_nl(p, w):
    low, high = _split(p + 2 + w)
    d = unpack.half_at(p)
    return d * unpack.iq4_value(low), d * unpack.iq4_value(high)


@triton.jit
def _mxfp4(p, w):
    low, high = _split(p + 1 + w)
    d = unpack.mxfp4_scale(p)
    return d * unpack.fp4_value(low), d * unpack.fp4_value(high)


@triton.jit
def unpack_pairs(p, w, TYPE: tl.constexpr):
    """The f32 values of the low and of the high nibbles of a tile of the type named TYPE, one of PAIR_TYPES."""
    if TYPE == "Q4_0":
        return _q4_0(p, w)
    elif TYPE == "Q4_1":
        return _q4_1(p, w)
    elif TYPE == "Q5_0":
        return _q5_0(p, w)
    elif TYPE == "Q5_1":
        return _q5_1(p, w)
    elif TYPE == "IQ4_NL":
        return _iq4_nl(p, w)
    else:
        tl.static_assert(TYPE == "MXFP4")
        return _mxfp4(p, w)
