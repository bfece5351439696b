"""Device functions on runs: 16 neighbouring weights that share a scale, times activations.

A run is four int32 words of int8 codes. For `x, pairs` and the shapes see decode_units.py; `element` is the index of
the run's first weight in its row. Where x points to int8, products are integers and a lane's own: f32 `[n_row, n_token,
n_unit]`. Where it points to bf16, the runs of all units are a tile of weights in bf16 and the tensor cores multiply it:
f32 `[n_row, n_token]`, summed over the units.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.codebooks import codebook
from moe_engine.kernels.decode_words import ASM, dp4a, load16, load_pair, look_up, scaled_codes
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
def _tile_dot(w0, w1, w2, w3, OFFSET: tl.constexpr, scale, minimum, x, element):
    """The same with weights `scale * (code - OFFSET) - minimum`, on the tensor cores.

    The order of rows, and of what is summed over, is that in which a matrix instruction wants the weights of a thread:
    with four units and 64 rows they need not pass through shared memory. `in_row_order` undoes that of the rows.
    """
    ROWS: tl.constexpr = w0.shape[0]
    UNITS: tl.constexpr = w0.shape[2]
    TOKENS: tl.constexpr = x.shape[1]
    p0, p1 = scaled_codes(w0, OFFSET, scale, minimum)
    p2, p3 = scaled_codes(w1, OFFSET, scale, minimum)
    p4, p5 = scaled_codes(w2, OFFSET, scale, minimum)
    p6, p7 = scaled_codes(w3, OFFSET, scale, minimum)
    even, odd = tl.join(tl.join(p0, p4), tl.join(p2, p6)), tl.join(tl.join(p1, p5), tl.join(p3, p7))
    words = tl.join(even, odd)
    low = (words & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    w = tl.reshape(tl.join(low, high), [2, ROWS // 16, 8, UNITS, 8, 2])
    w = tl.reshape(tl.permute(w, (1, 0, 2, 4, 3, 5)), [ROWS, UNITS * 16])
    first = tl.reshape(x, [TOKENS, 1, 1]) + tl.reshape(element, [1, UNITS, 1])
    first = tl.multiple_of(first, (32, 32, 32))  # bytes: the compiler cannot see through a reshape
    a = tl.load(first + tl.arange(0, 16)[None, None, :], cache_modifier=".ca")
    a = tl.permute(tl.reshape(a, [TOKENS, UNITS, 8, 2]), (0, 2, 1, 3))
    a = tl.reshape(a, [TOKENS, UNITS * 16])
    if not ASM:  # Triton's interpreter has no products of bf16
        w, a = w.to(tl.float32), a.to(tl.float32)
    return tl.dot(w, tl.trans(a), input_precision="ieee")


@triton.jit
def in_row_order(y):
    """A sum of tile products, f32 `[n_row, n_token]`, with its rows in order."""
    ROWS: tl.constexpr = y.shape[0]
    y = tl.permute(tl.reshape(y, [ROWS // 16, 2, 8, y.shape[1]]), (1, 0, 2, 3))
    return tl.reshape(y, [ROWS, y.shape[3]])


@triton.jit
def run(w0, w1, w2, w3, scale, OFFSET: tl.constexpr, x, pairs, element):
    """A run whose weights are `scale * (code - OFFSET)`, codes signed."""
    if x.dtype.element_ty == tl.bfloat16:
        return _tile_dot(w0, w1, w2, w3, OFFSET, scale, tl.zeros([1, 1, 1], tl.float32), x, element)
    else:
        dx, sx = load_pair(pairs + element // 8)
        return scale * (dx * _dot(w0, w1, w2, w3, x, element) - OFFSET * sx)


@triton.jit
def run_min(w0, w1, w2, w3, scale, minimum, x, pairs, element):
    """A run whose weights are `scale * code - minimum`."""
    if x.dtype.element_ty == tl.bfloat16:
        return _tile_dot(w0, w1, w2, w3, 0, scale, minimum, x, element)
    else:
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
