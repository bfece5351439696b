"""The Triton kernels of `decode_matvec`: one matrix (or a stack) with epilogues, and several matrices in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_activations_kernel import rounded, step_of, store_run
from moe_engine.kernels.decode_dots import fast_dots, tile_dots, unpacked_dots
from moe_engine.kernels.decode_overlap import let_next_kernel_start, wait_for_previous_kernel
from moe_engine.kernels.decode_words import prefetch_rows


@triton.jit
def _fast_rows(
    data,
    row,
    codes,
    pairs,
    source,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    N_IN: tl.constexpr,
    N_UNIT: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rows `row` of a matrix times the activations of index `source`, once those are there: f32 `[ROWS, TOKENS]`."""
    rows = tl.multiple_of(data + row.to(tl.int64) * ROW_BYTES, ALIGN)
    if PREFETCH:
        prefetch_rows(rows, ROW_BYTES)
    source += wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    return fast_dots(
        rows, codes + source * N_IN, pairs + source * (N_IN // 8), TYPE, ALIGN, N_UNIT, ROWS, TOKENS, LANES, UNROLL
    )


@triton.jit(do_not_specialize=["n_token", "n_out"])
def matvec_kernel(
    data,
    x,
    codes,
    pairs,
    table,
    residual,
    out,
    out_codes,
    out_pairs,
    n_token,
    n_out,
    data_stride,
    x_batch_stride,
    x_stride,
    out_batch_stride,
    out_stride,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    N_RUN: tl.constexpr,
    RUN_WIDTH: tl.constexpr,
    N_UNIT: tl.constexpr,
    N_IN: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (i, j, b): tokens `TOKENS * i` and following with rows `ROWS * j` and following of matrix b.

    Programs of the same rows are neighbours, so that all but the first find the rows in the cache.
    """
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    matrix = data + batch * data_stride
    inside = tl.minimum(row, n_out - 1)
    if TILES:
        rows = tl.multiple_of(matrix + inside.to(tl.int64) * ROW_BYTES, ALIGN)
        if PREFETCH:
            prefetch_rows(rows, ROW_BYTES)
        source = batch * n_token + tl.minimum(token, n_token - 1) + wait_for_previous_kernel(OVERLAP)
        let_next_kernel_start(OVERLAP)
        y = tile_dots(rows, x + source * N_IN, TYPE, ALIGN, N_UNIT, ROWS, TOKENS, LANES, UNROLL)
    elif ALIGN > 0:
        source = batch * n_token + tl.minimum(token, n_token - 1)
        y = _fast_rows(
            matrix, inside, codes, pairs, source, TYPE, ALIGN, N_IN, N_UNIT, ROW_BYTES,
            ROWS, TOKENS, LANES, UNROLL, PREFETCH, OVERLAP,
        )  # fmt: skip
    else:
        first = batch * x_batch_stride + tl.program_id(0) * x_stride + wait_for_previous_kernel(OVERLAP)
        let_next_kernel_start(OVERLAP)
        rows = matrix + inside.to(tl.int64) * ROW_BYTES
        y = unpacked_dots(rows, x + first, table, TYPE, BLOCK_BYTES, N_RUN, RUN_WIDTH, N_IN, ROWS)[:, None]
    y = tl.trans(y)
    at = batch * out_batch_stride + token[:, None] * out_stride + row[None, :]
    mask = (token[:, None] < n_token) & (row[None, :] < n_out)
    if RESIDUAL:
        y += tl.load(residual + at, mask=mask, other=0.0)
    tl.store(out + at, y, mask=mask)
    if QUANTIZE:
        RUNS: tl.constexpr = TOKENS * ROWS // 16
        y = tl.reshape(y, [RUNS, 16])
        scale, inverse = step_of(y)
        run = tl.arange(0, RUNS)
        of_token = tl.program_id(0) * TOKENS + run // (ROWS // 16)
        of_row = tl.program_id(1) * ROWS + run % (ROWS // 16) * 16
        target = (batch * out_batch_stride + of_token * out_stride + of_row) // 16
        fits = (of_token < n_token) & (of_row < n_out)
        store_run(out_codes, out_pairs, rounded(y * inverse[:, None]), scale, target, fits)


@triton.jit
def _matrix(
    data,
    block,
    codes,
    pairs,
    out,
    n_token,
    out_stride,
    N_OUT: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    N_IN: tl.constexpr,
    N_UNIT: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rows `ROWS * block` and following, if the matrix has them."""
    if (block >= 0) & (block < (N_OUT + ROWS - 1) // ROWS):
        row = block * ROWS + tl.arange(0, ROWS)
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        y = _fast_rows(
            data, tl.minimum(row, N_OUT - 1), codes, pairs, tl.minimum(token, n_token - 1), TYPE, ALIGN, N_IN, N_UNIT,
            ROW_BYTES, ROWS, TOKENS, LANES, UNROLL, PREFETCH, OVERLAP,
        )  # fmt: skip
        at = token[None, :] * out_stride + row[:, None]
        tl.store(out + at, y, mask=(row[:, None] < N_OUT) & (token[None, :] < n_token))


@triton.jit(do_not_specialize=["n_token"])
def matvecs_kernel(
    a,
    b,
    c,
    codes,
    pairs,
    out,
    n_token,
    out_stride,
    A: tl.constexpr,
    A_ALIGN: tl.constexpr,
    A_OUT: tl.constexpr,
    A_UNITS: tl.constexpr,
    A_ROW_BYTES: tl.constexpr,
    B: tl.constexpr,
    B_ALIGN: tl.constexpr,
    B_OUT: tl.constexpr,
    B_UNITS: tl.constexpr,
    B_ROW_BYTES: tl.constexpr,
    C: tl.constexpr,
    C_ALIGN: tl.constexpr,
    C_OUT: tl.constexpr,
    C_UNITS: tl.constexpr,
    C_ROW_BYTES: tl.constexpr,
    N_IN: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (i, j): tokens `TOKENS * i` and following; the blocks j of ROWS rows are those of a, then b, then c.

    Their results lie side by side in a row of `out`.
    """
    block = tl.program_id(1)
    _matrix(
        a, block, codes, pairs, out, n_token, out_stride, A_OUT, A, A_ALIGN, N_IN, A_UNITS, A_ROW_BYTES,
        ROWS, TOKENS, LANES, UNROLL, PREFETCH, OVERLAP,
    )  # fmt: skip
    block -= (A_OUT + ROWS - 1) // ROWS
    _matrix(
        b, block, codes, pairs, out + A_OUT, n_token, out_stride, B_OUT, B, B_ALIGN, N_IN, B_UNITS, B_ROW_BYTES,
        ROWS, TOKENS, LANES, UNROLL, PREFETCH, OVERLAP,
    )  # fmt: skip
    if C_OUT > 0:
        block -= (B_OUT + ROWS - 1) // ROWS
        _matrix(
            c, block, codes, pairs, out + (A_OUT + B_OUT), n_token, out_stride, C_OUT, C, C_ALIGN, N_IN, C_UNITS,
            C_ROW_BYTES, ROWS, TOKENS, LANES, UNROLL, PREFETCH, OVERLAP,
        )  # fmt: skip
