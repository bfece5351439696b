"""Device functions that round activations to 8-bit codes, and the kernel that does so for a product's input."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_overlap import let_next_kernel_start, wait_for_previous_kernel


@triton.jit
def rounded(x):
    """The nearest integers (ties to even) of x, -128 to 127, as int32.

    Adding 1.5 * 2^23 rounds, and leaves the integer in the low bits.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True) << 24 >> 24


@triton.jit
def step_of(x):
    """What one step of 8-bit codes stands for, f32 `[n_run]`, and its inverse: x f32 `[n_run, 16]`."""
    largest = tl.max(tl.abs(x), axis=1)
    inverse = 127.0 / tl.where(largest > 1e-30, largest, 1.0)  # smaller ones have no f32 inverse and round to zero
    # An infinity or a NaN must not be lost
    return largest / 127.0 + 0.0 * tl.sum(x, axis=1), inverse


@triton.jit
def store_run(codes, pairs, q, scale, run, inside):
    """Codes q int32 `[n_run, 16]` and their scales `[n_run]` as runs number `run` of an array."""
    tl.store(codes + run[:, None] * 16 + tl.arange(0, 16)[None, :], q.to(tl.int8), mask=inside[:, None])
    tl.store(pairs + 2 * run, scale, mask=inside)
    tl.store(pairs + 2 * run + 1, scale * tl.sum(q, axis=1).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["n_run", "n_row"])
def quantize_kernel(
    x,
    codes,
    pairs,
    n_run,
    n_row,
    batch_stride,
    row_stride,
    RUNS_PER_ROW: tl.constexpr,
    RUNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program i quantizes runs `RUNS * i` and following of the rows of x, `n_row` a batch."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS) + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    inside = run < n_run
    row = run // RUNS_PER_ROW
    start = (row // n_row) * batch_stride + (row % n_row) * row_stride + (run % RUNS_PER_ROW) * 16
    i = tl.arange(0, 16)[None, :]
    values = tl.load(x + start[:, None] + i, mask=inside[:, None], other=0.0).to(tl.float32)
    scale, inverse = step_of(values)
    store_run(codes, pairs, rounded(values * inverse[:, None]), scale, run, inside)
