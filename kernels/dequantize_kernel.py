"""The Triton kernel that writes quantized blocks out as floats; `dequantize.dequantize` launches it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels import unpack, unpack_words_iq, unpack_words_k
from moe_engine.kernels.launch import launched
from moe_engine.kernels.unpack_pairs import unpack_pairs
from moe_engine.kernels.unpack_words import INTERPRETED as INTERPRETED
from moe_engine.kernels.unpack_words import LANES
from moe_engine.kernels.unpack_words import round_to as round_to


@triton.jit
def unpack_blocks(p, s, w, table, TYPE: tl.constexpr):
    """The f32 values of a tile of blocks of the type named TYPE (see unpack.py)."""
    if TYPE == "F32":
        return unpack.f32(p, s, w)
    elif TYPE == "F16":
        return unpack.f16(p, s, w)
    elif TYPE == "BF16":
        return unpack.bf16(p, s, w)
    elif TYPE == "Q4_0":
        return unpack.q4_0(p, s, w)
    elif TYPE == "Q4_1":
        return unpack.q4_1(p, s, w)
    elif TYPE == "Q5_0":
        return unpack.q5_0(p, s, w)
    elif TYPE == "Q5_1":
        return unpack.q5_1(p, s, w)
    elif TYPE == "Q8_0":
        return unpack.q8_0(p, s, w)
    elif TYPE == "IQ4_NL":
        return unpack.iq4_nl(p, s, w, table)
    elif TYPE == "MXFP4":
        return unpack.mxfp4(p, s, w, table)
    elif TYPE == "NVFP4":
        return unpack.nvfp4(p, s, w, table)
    elif TYPE == "Q2_K":
        return unpack.q2_k(p, s, w)
    elif TYPE == "Q3_K":
        return unpack.q3_k(p, s, w)
    elif TYPE == "Q4_K":
        return unpack.q4_k(p, s, w)
    elif TYPE == "Q5_K":
        return unpack.q5_k(p, s, w)
    elif TYPE == "Q6_K":
        return unpack.q6_k(p, s, w)
    elif TYPE == "TQ1_0":
        return unpack.tq1_0(p, s, w)
    elif TYPE == "TQ2_0":
        return unpack.tq2_0(p, s, w)
    elif TYPE == "IQ2_XXS":
        return unpack.iq2_xxs(p, s, w, table)
    elif TYPE == "IQ2_XS":
        return unpack.iq2_xs(p, s, w, table)
    elif TYPE == "IQ2_S":
        return unpack.iq2_s(p, s, w, table)
    elif TYPE == "IQ3_XXS":
        return unpack.iq3_xxs(p, s, w, table)
    elif TYPE == "IQ3_S":
        return unpack.iq3_s(p, s, w, table)
    elif TYPE == "IQ1_S":
        return unpack.iq1_s(p, s, w, table)
    elif TYPE == "IQ1_M":
        return unpack.iq1_m(p, s, w, table)
    else:
        tl.static_assert(TYPE == "IQ4_XS")
        return unpack.iq4_xs(p, s, w, table)


@triton.jit
def _write_words(p, lane, at, mask, table, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Writes the values of the lanes' blocks (see unpack_words.py)."""
    if TYPE == "Q2_K":
        unpack_words_k.q2_k(p, lane, at, mask, ALIGN)
    elif TYPE == "Q3_K":
        unpack_words_k.q3_k(p, lane, at, mask, ALIGN)
    elif TYPE == "Q4_K":
        unpack_words_k.q4_k(p, lane, at, mask, ALIGN)
    elif TYPE == "Q5_K":
        unpack_words_k.q5_k(p, lane, at, mask, ALIGN)
    elif TYPE == "Q6_K":
        unpack_words_k.q6_k(p, lane, at, mask, ALIGN)
    elif TYPE == "TQ2_0":
        unpack_words_k.tq2_0(p, lane, at, mask, ALIGN)
    elif TYPE == "IQ4_XS":
        unpack_words_iq.iq4_xs(p, lane, at, mask, table, ALIGN)
    elif TYPE == "IQ2_XXS":
        unpack_words_iq.iq2_xxs(p, lane, at, mask, table, ALIGN)
    elif TYPE == "IQ2_XS":
        unpack_words_iq.iq2_xs(p, lane, at, mask, table, ALIGN)
    elif TYPE == "IQ2_S":
        unpack_words_iq.iq2_s(p, lane, at, mask, table, ALIGN)
    elif TYPE == "IQ3_XXS":
        unpack_words_iq.iq3_xxs(p, lane, at, mask, table, ALIGN)
    elif TYPE == "IQ3_S":
        unpack_words_iq.iq3_s(p, lane, at, mask, table, ALIGN)
    elif TYPE == "IQ1_S":
        unpack_words_iq.iq1_s(p, lane, at, mask, table, ALIGN)
    else:
        tl.static_assert(TYPE == "IQ1_M")
        unpack_words_iq.iq1_m(p, lane, at, mask, table, ALIGN)


@triton.jit
def dequantize_tile(
    data,
    table,
    out,
    n_blocks,
    first,
    TYPE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    N_RUN: tl.constexpr,
    RUN_WIDTH: tl.constexpr,
    DISTANCE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ALIGN: tl.constexpr = 1,
):
    """Writes blocks `first` to `first + TILE_BLOCKS` of the `n_blocks` at `data` to their places in `out`.

    DISTANCE: -1 for types of unpack_words*.py, 16 for those of unpack_pairs.py, whose runs are then the tile's, else 0.
    ALIGN: a power of two that divides the addresses of all blocks.
    """
    # Past the end the last block is read again, so that no load needs a mask
    if DISTANCE < 0:
        lane = tl.arange(0, LANES * TILE_BLOCKS)
        block = first.to(tl.int64) + lane // LANES
        p = data + tl.minimum(block, n_blocks - 1) * BLOCK_BYTES
        at = out + block * (N_RUN * RUN_WIDTH)
        _write_words(p, (lane % LANES).to(tl.uint32), at, block < n_blocks, table, TYPE, ALIGN)
    else:
        blocks = first.to(tl.int64) + tl.arange(0, TILE_BLOCKS)[:, None, None]
        s = tl.arange(0, N_RUN)[None, :, None]
        w = tl.arange(0, RUN_WIDTH)[None, None, :]
        p = data + tl.minimum(blocks, n_blocks - 1) * BLOCK_BYTES
        if DISTANCE > 0:
            low, high = unpack_pairs(p, w, TYPE)
            at = out + blocks * (2 * RUN_WIDTH) + w
            tl.store(at, round_to(low, out.dtype.element_ty), mask=blocks < n_blocks)
            tl.store(at + DISTANCE, round_to(high, out.dtype.element_ty), mask=blocks < n_blocks)
        else:
            y = unpack_blocks(p, s, w, table, TYPE)
            at = out + blocks * (N_RUN * RUN_WIDTH) + (s * RUN_WIDTH + w)
            tl.store(at, round_to(y, out.dtype.element_ty), mask=blocks < n_blocks)


@launched
@triton.jit(do_not_specialize=["data", "n_blocks", "batch_stride"])
def dequantize_kernel(
    data,
    table,
    out,
    n_blocks,
    batch_stride,
    TYPE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    N_RUN: tl.constexpr,
    RUN_WIDTH: tl.constexpr,
    DISTANCE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Program (i, b) writes blocks `TILE_BLOCKS * i` and following of matrix b; `n_blocks` are in a matrix."""
    batch = tl.program_id(1).to(tl.int64)
    data = tl.multiple_of(data + batch * batch_stride, ALIGN)
    out += batch * n_blocks * (N_RUN * RUN_WIDTH * (2 if DISTANCE > 0 else 1))
    first = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
    dequantize_tile(
        data, table, out, n_blocks, first, TYPE, BLOCK_BYTES, N_RUN, RUN_WIDTH, DISTANCE, TILE_BLOCKS, ALIGN
    )
