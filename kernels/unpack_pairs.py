"""Triton device functions that turn blocks of 4-bit fields into f32 values, two for each byte loaded.

Like unpack.py, with the same results to the last bit, but a tile consists of runs of neighbouring bytes:
  p     uint8 pointers to the blocks' first bytes, `[n_block, 1, 1]`
  j     the index of the run within its block, `[1, n_run, 1]`
  w     the index of the byte within its run, `[1, 1, width]`
Each returns two f32 tiles `[n_block, n_run, width]`: of the low nibbles, whose elements are `first_element(j) + w`,
and of the high ones, `distance` elements further on.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels import unpack

# Runs in a block, bytes of a run, distance.
PAIR_RUNS = dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"), (1, 16, 16))
PAIR_RUNS |= {"Q4_K": (4, 32, 32), "Q5_K": (4, 32, 32), "Q6_K": (8, 16, 64), "IQ4_XS": (8, 16, 16)}


@triton.jit
def first_element(j, TYPE: tl.constexpr):
    if TYPE == "Q6_K":
        return 128 * (j // 4) + 16 * (j % 4)
    elif TYPE == "Q4_K" or TYPE == "Q5_K":
        return 64 * j
    else:
        return 32 * j


@triton.jit
def _split(p):
    byte = tl.load(p).to(tl.int32)
    return byte & 15, byte >> 4


@triton.jit
def _q4_0(p, j, w):
    low, high = _split(p + 2 + 16 * j + w)
    d = unpack._f16(p)
    return d * (low - 8).to(tl.float32), d * (high - 8).to(tl.float32)


@triton.jit
def _q4_1(p, j, w):
    low, high = _split(p + 4 + 16 * j + w)
    d = unpack._f16(p)
    m = unpack._f16(p + 2)
    return d * low.to(tl.float32) + m, d * high.to(tl.float32) + m


@triton.jit
def _q5_0(p, j, w):
    low, high = _split(p + 6 + 16 * j + w)
    bits = unpack._u32(p + 2) >> w
    low |= (bits & 1) << 4
    high |= ((bits >> 16) & 1) << 4
    d = unpack._f16(p)
    return d * (low - 16).to(tl.float32), d * (high - 16).to(tl.float32)


@triton.jit
def _q5_1(p, j, w):
    low, high = _split(p + 8 + 16 * j + w)
    bits = unpack._u32(p + 4) >> w
    low |= (bits & 1) << 4
    high |= ((bits >> 16) & 1) << 4
    d = unpack._f16(p)
    m = unpack._f16(p + 2)
    return d * low.to(tl.float32) + m, d * high.to(tl.float32) + m


@triton.jit
def _iq4_nl(p, j, w):
    low, high = _split(p + 2 + 16 * j + w)
    d = unpack._f16(p)
    return d * unpack.iq4_value(low), d * unpack.iq4_value(high)


@triton.jit
def _mxfp4(p, j, w):
    low, high = _split(p + 1 + 16 * j + w)
    d = unpack.mxfp4_scale(p)
    return d * unpack.fp4_value(low), d * unpack.fp4_value(high)


@triton.jit
def _q4_k(p, j, w):
    low, high = _split(p + 16 + 32 * j + w)
    return unpack._scale_and_min(p, 2 * j, low), unpack._scale_and_min(p, 2 * j + 1, high)


@triton.jit
def _q5_k(p, j, w):
    low, high = _split(p + 48 + 32 * j + w)
    bits = tl.load(p + 16 + w).to(tl.int32) >> (2 * j)
    low |= (bits & 1) << 4
    high |= (bits & 2) << 3
    return unpack._scale_and_min(p, 2 * j, low), unpack._scale_and_min(p, 2 * j + 1, high)


@triton.jit
def _q6_k(p, j, w):
    low, high = _split(p + 16 * j + w)
    bits = tl.load(p + 128 + 32 * (j // 4) + 16 * (j % 2) + w).to(tl.int32) >> (j % 4 // 2 * 2)
    low |= (bits & 3) << 4
    high |= bits & 48
    scale = p + 192 + 8 * (j // 4) + j % 4
    d = unpack._f16(p + 208)
    d_low = d * unpack._i8(scale).to(tl.float32)
    d_high = d * unpack._i8(scale + 4).to(tl.float32)
    return d_low * (low - 32).to(tl.float32), d_high * (high - 32).to(tl.float32)


@triton.jit
def _iq4_xs(p, j, w):
    low, high = _split(p + 8 + 16 * j + w)
    scale = unpack._nibble(p + 4 + j // 2, j % 2) | (((unpack._u16(p + 2) >> (2 * j)) & 3) << 4)
    d = unpack._f16(p) * (scale - 32).to(tl.float32)
    return d * unpack.iq4_value(low), d * unpack.iq4_value(high)


@triton.jit
def unpack_pairs(p, j, w, TYPE: tl.constexpr):
    """The f32 values of the low and of the high nibbles of a tile of the type named TYPE, one of PAIR_RUNS."""
    if TYPE == "Q4_0":
        return _q4_0(p, j, w)
    elif TYPE == "Q4_1":
        return _q4_1(p, j, w)
    elif TYPE == "Q5_0":
        return _q5_0(p, j, w)
    elif TYPE == "Q5_1":
        return _q5_1(p, j, w)
    elif TYPE == "IQ4_NL":
        return _iq4_nl(p, j, w)
    elif TYPE == "MXFP4":
        return _mxfp4(p, j, w)
    elif TYPE == "Q4_K":
        return _q4_k(p, j, w)
    elif TYPE == "Q5_K":
        return _q5_k(p, j, w)
    elif TYPE == "Q6_K":
        return _q6_k(p, j, w)
    else:
        tl.static_assert(TYPE == "IQ4_XS")
        return _iq4_xs(p, j, w)
