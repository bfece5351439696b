"""The Triton kernel that writes quantized blocks out as floats; `dequantize.dequantize` launches it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels import unpack
from moe_engine.kernels.unpack_pairs import first_element, unpack_pairs


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


INTERPRETED = tl.constexpr(not isinstance(unpack_blocks, triton.JITFunction))


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
):
    """Writes blocks `first` to `first + TILE_BLOCKS` of the `n_blocks` at `data` to their places in `out`.

    DISTANCE: 0, or that of a type of unpack_pairs.py, whose runs are then the tile's.
    """
    blocks = first.to(tl.int64) + tl.arange(0, TILE_BLOCKS)[:, None, None]
    s = tl.arange(0, N_RUN)[None, :, None]
    w = tl.arange(0, RUN_WIDTH)[None, None, :]
    # Past the end the last block is read again, so that no load needs a mask
    p = data + tl.minimum(blocks, n_blocks - 1) * BLOCK_BYTES
    if DISTANCE > 0:
        low, high = unpack_pairs(p, s, w, TYPE)
        at = out + blocks * (2 * N_RUN * RUN_WIDTH) + (first_element(s, TYPE) + w)
        tl.store(at, round_to(low, out.dtype.element_ty), mask=blocks < n_blocks)
        tl.store(at + DISTANCE, round_to(high, out.dtype.element_ty), mask=blocks < n_blocks)
    else:
        y = unpack_blocks(p, s, w, table, TYPE)
        at = out + blocks * (N_RUN * RUN_WIDTH) + (s * RUN_WIDTH + w)
        tl.store(at, round_to(y, out.dtype.element_ty), mask=blocks < n_blocks)


@triton.jit(do_not_specialize=["n_blocks", "batch_stride"])
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
):
    """Program (i, b) writes blocks `TILE_BLOCKS * i` and following of matrix b; `n_blocks` are in a matrix."""
    batch = tl.program_id(1).to(tl.int64)
    data += batch * batch_stride
    out += batch * n_blocks * (N_RUN * RUN_WIDTH * (2 if DISTANCE > 0 else 1))
    first = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
    dequantize_tile(data, table, out, n_blocks, first, TYPE, BLOCK_BYTES, N_RUN, RUN_WIDTH, DISTANCE, TILE_BLOCKS)
