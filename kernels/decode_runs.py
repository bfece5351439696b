"""Device functions on runs: 16 neighbouring weights that share a scale, times 8-bit activations.

A run is four int32 words of int8 codes. For `x, pairs` and the shapes see decode_units.py; `element` is the index of
the run's first weight in its row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.codebooks import codebook
from moe_engine.kernels.decode_words import dp4a, load16, load_pair, look_up
from moe_engine.kernels.quant_types import BY_NAME

_NL = codebook(BY_NAME["IQ4_NL"].id).ravel().view("<u4").tolist()
_NL0, _NL1, _NL2, _NL3 = (tl.constexpr(word) for word in _NL)


@triton.jit
def _dot(w0, w1, w2, w3, x, element):
    """The dot products of runs of codes with the activations from `element` on: f32."""
    a0, a1, a2, a3 = load16(x + element, 16)
    total = dp4a(w0, a0, tl.full([1, 1, 1], 0, tl.int32))
    return dp4a(w3, a3, dp4a(w2, a2, dp4a(w1, a1, total))).to(tl.float32)


@triton.jit
def run(w0, w1, w2, w3, scale, OFFSET: tl.constexpr, x, pairs, element):
    """A run whose weights are `scale * (code - OFFSET)`."""
    dx, sx = load_pair(pairs + element // 8)
    return scale * (dx * _dot(w0, w1, w2, w3, x, element) - OFFSET * sx)


@triton.jit
def run_min(w0, w1, w2, w3, scale, minimum, x, pairs, element):
    """A run whose weights are `scale * code - minimum`."""
    dx, sx = load_pair(pairs + element // 8)
    return scale * (dx * _dot(w0, w1, w2, w3, x, element)) - minimum * sx


@triton.jit
def low(w):
    return w & 0x0F0F0F0F


@triton.jit
def high(w):
    return (w >> 4) & 0x0F0F0F0F


@triton.jit
def looked_up(a, b, c, e, scale, x, pairs, element):
    """Two runs of nibbles that stand for the IQ4_NL values."""
    a0, a1 = look_up(a, _NL0, _NL1, _NL2, _NL3)
    b0, b1 = look_up(b, _NL0, _NL1, _NL2, _NL3)
    c0, c1 = look_up(c, _NL0, _NL1, _NL2, _NL3)
    e0, e1 = look_up(e, _NL0, _NL1, _NL2, _NL3)
    y = run(a0, b0, c0, e0, scale, 0, x, pairs, element)
    return y + run(a1, b1, c1, e1, scale, 0, x, pairs, element + 16)
