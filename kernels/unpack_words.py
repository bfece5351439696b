"""What the Triton device functions of unpack_words_k.py and unpack_words_iq.py share: they write the values of blocks
of 256 weights, which they read as 32-bit words.

Four lanes share a block. A lane makes 64 values in eight runs of 8, so that the block's header is decoded once for many
values, while neighbouring lanes write neighbouring runs. A type's function takes
  p      uint8 pointers to the lanes' blocks, `[n_lane]`, all multiples of ALIGN
  lane   the index of the lane in its block, uint32 `[n_lane]`
  at     pointers to the first values of the lanes' blocks in the output, `[n_lane]`
  mask   whether to write, `[n_lane]`
  table  int8 pointer to the type's codebook (codebooks.py), 8-byte aligned, where it has one
and loads all that it needs before its first store, because the compiler does not move loads over stores. Results equal
those of unpack.py to the last bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

LANES = tl.constexpr(4)


# Loads of 1, 2, 4 and 8 bytes from each pointer of p as uint32, or as two of them


@triton.jit
def load1(p):
    return tl.load(p).to(tl.uint32)


@triton.jit
def load2(p, ALIGN: tl.constexpr):
    if ALIGN % 2 == 0:
        return tl.load(p.to(tl.pointer_type(tl.uint16))).to(tl.uint32)
    else:
        return load1(p) | (load1(p + 1) << 8)


@triton.jit
def load4(p, ALIGN: tl.constexpr):
    if ALIGN % 4 == 0:
        return tl.load(p.to(tl.pointer_type(tl.uint32)))
    else:
        return _shifted(tl.load(_word_of(p)), tl.load(_word_of(p + 3)), p)


@triton.jit
def load8(p, ALIGN: tl.constexpr):
    if ALIGN % 8 == 0:
        return tl.split(tl.load(p.to(tl.pointer_type(tl.uint32))[:, None] + tl.arange(0, 2)[None, :]))
    elif ALIGN % 4 == 0:
        return load4(p, ALIGN), load4(p + 4, ALIGN)
    else:
        middle = tl.load(_word_of(p) + 1)
        # The last word is found from the last byte, so that nothing beyond its word is read
        return _shifted(tl.load(_word_of(p)), middle, p), _shifted(middle, tl.load(_word_of(p + 7)), p)


@triton.jit
def _word_of(p):
    """Pointers to the aligned words that hold the bytes at p."""
    return (p.to(tl.int64) & -4).to(tl.pointer_type(tl.uint32))


@triton.jit
def _shifted(first, second, p):
    """The word at p from the aligned one that holds its first byte and the one that holds its last."""
    both = first.to(tl.uint64) | (second.to(tl.uint64) << 32)
    return (both >> ((p.to(tl.int64) & 3) * 8).to(tl.uint64)).to(tl.uint32)


@triton.jit
def _load(p, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    if SIZE == 1:
        return load1(p)
    elif SIZE == 2:
        return load2(p, ALIGN)
    elif SIZE == 4:
        return load4(p, ALIGN)
    else:
        tl.static_assert(SIZE == 8)
        return load8(p, ALIGN)


@triton.jit
def load_four(p, STEP: tl.constexpr, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    """SIZE bytes from p, p + STEP and so on: a tuple of four."""
    a = _load(p, SIZE, ALIGN)
    b = _load(p + STEP, SIZE, ALIGN)
    c = _load(p + 2 * STEP, SIZE, ALIGN)
    d = _load(p + 3 * STEP, SIZE, ALIGN)
    return a, b, c, d


@triton.jit
def load_eight(p, STEP: tl.constexpr, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    a, b, c, d = load_four(p, STEP, SIZE, ALIGN)
    e, f, g, h = load_four(p + 4 * STEP, STEP, SIZE, ALIGN)
    return a, b, c, d, e, f, g, h


# Numbers. A field of bits becomes a float where it stands: as the end of the mantissa of 2^(23 - place), which is then
# subtracted. That is exact and takes no shift and no conversion.


@triton.jit
def half(w):
    """The value of the f16 in the low bits of each word."""
    return (w & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def field(w, AT: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr = 0):
    """The number in WIDTH bits from bit AT of each word, minus ZERO: f32."""
    SHIFT: tl.constexpr = 16 if AT + WIDTH > 23 else 0
    PLACE: tl.constexpr = AT - SHIFT
    bits = ((w >> SHIFT) & (((1 << WIDTH) - 1) << PLACE)) | ((150 - PLACE) << 23)
    return bits.to(tl.float32, bitcast=True) - (2.0 ** (23 - PLACE) + ZERO)


@triton.jit
def codes(a, b, AT: tl.constexpr, WIDTH: tl.constexpr, ZERO: tl.constexpr = 0):
    """The fields from bit AT of the four bytes of a, then of b, minus ZERO: f32 `[n_lane, 8]`."""
    halves = tl.join(a, b)[:, :, None] >> (16 * tl.arange(0, 2)).to(tl.uint32)[None, None, :]
    place = (AT + 8 * tl.arange(0, 2)).to(tl.uint32)[None, None, None, :]
    base = (150 - place) << 23
    bits = (halves[:, :, :, None] & (((1 << WIDTH) - 1) << place)) | base
    numbers = bits.to(tl.float32, bitcast=True) - (base.to(tl.float32, bitcast=True) + ZERO)
    return tl.reshape(numbers, [a.shape[0], 8])


@triton.jit
def moved(w, BY: tl.constexpr, MASK: tl.constexpr):
    """The bits of MASK after a shift by BY: to the left if positive, else to the right."""
    if BY >= 0:
        return (w << BY) & MASK
    else:
        return (w >> -BY) & MASK


# Stores


@triton.jit
def _probe():
    """Never run: its class says whether kernels are compiled or interpreted."""


INTERPRETED = tl.constexpr(not isinstance(_probe, triton.JITFunction))


@triton.jit
def round_to(y, dtype: tl.constexpr):
    """Rounds f32 to nearest even. By hand for bf16 in the interpreter, which would truncate."""
    if dtype == tl.bfloat16 and INTERPRETED:
        bits = y.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(y == y, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(dtype)


@triton.jit
def write(at, y, mask):
    """The runs y `[n_lane, 8]` to their places."""
    values = round_to(y, at.dtype.element_ty)
    tl.store(at[:, None] + tl.arange(0, 8)[None, :], values, mask=mask[:, None])
