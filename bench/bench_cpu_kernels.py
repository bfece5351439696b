"""Speed of `CpuKernels.linear` for every type and instruction set: one token by weight bytes, many by operations.

    python bench/bench_cpu_kernels.py [--types Q4_K,Q8_0] [--threads 1,2] [--tiers avx512] [--mib 192]
        [--tokens 8,32,128,512] [--skip-one]

"cache" repeats one 768 x 2048 matrix; "memory" walks a stack of them larger than the last level cache, as decoding
walks experts. The read bandwidth of the same run stands in the last line.

The second table multiplies one such matrix with T tokens, in turns all at once and 4 at a time (the most that share
the decoding of a row when there are few), and shows the GFLOP/s of both.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels, available_tiers
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QuantType

N_OUT, N_IN = 768, 2048


def stack_of_blocks(type: QuantType, n_bytes: int) -> QuantTensor:
    """A stack of matrices of small random weights: scales far from NaN and subnormal numbers, which are slow."""
    n_matrices = max(2, n_bytes // (N_OUT * type.row_bytes(N_IN)))
    rng = np.random.default_rng(0)
    one = rng.integers(40, 60, (N_OUT, type.row_bytes(N_IN)), dtype=np.uint8)
    return QuantTensor(torch.from_numpy(np.tile(one, (n_matrices, 1, 1))), type, N_IN)


def best_seconds(call: Callable[[], object], at_least: float = 0.25) -> float:
    """Shortest of several runs after one to warm up."""
    call()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < at_least:
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
    return best


def linear_rate(kernels: CpuKernels, weight: QuantTensor, n_tokens: int = 1) -> float:
    x = torch.randn(weight.shape[0], n_tokens, N_IN)
    return weight.nbytes / best_seconds(lambda: kernels.linear(x, weight)) / 1e9


def many_token_rates(kernels: CpuKernels, weight: QuantTensor, n_tokens: int) -> tuple[float, float]:
    """GFLOP/s with tokens 4 at a time and all at once."""
    x = torch.randn(n_tokens, N_IN)
    fours = [part.contiguous() for part in x.split(4)]

    def by_fours() -> None:
        for part in fours:
            kernels.linear(part, weight)

    calls, best = (by_fours, lambda: kernels.linear(x, weight)), [float("inf")] * 2
    for _ in range(8):  # in turns: other work on the machine hits both
        best = [min(seconds, best_seconds(call, 0.03)) for call, seconds in zip(calls, best, strict=True)]
    flops = 2 * n_tokens * N_OUT * N_IN
    return flops / best[0] / 1e9, flops / best[1] / 1e9


def many_token_table(types: list[str], tiers: list[str], thread_counts: list[int], tokens: list[int]) -> None:
    print(f"\n{N_OUT} x {N_IN}, T tokens, GFLOP/s: 4 at a time -> all at once")
    print(f"{'type':8} {'tier':7} {'threads':>7}" + "".join(f"{f'T = {n}':>20}" for n in tokens))
    for name in types:
        weight = stack_of_blocks(BY_NAME[name], 1)[0]
        for tier in tiers:
            _cpu.set_tier(tier)
            for threads in thread_counts:
                rates = (many_token_rates(CpuKernels(threads), weight, n) for n in tokens)
                cells = (f"{f'{few:.0f} -> {many:.0f}':>20}" for few, many in rates)
                print(f"{name:8} {tier:7} {threads:7}" + "".join(cells), flush=True)


def read_bandwidth(threads: int, n_bytes: int) -> float:
    """Of a float32 sum or dot product over memory larger than the caches, whichever is faster."""
    torch.set_num_threads(threads)
    x = torch.ones(n_bytes // 4)
    return x.numel() * 4 / min(best_seconds(x.sum, 1.0), best_seconds(lambda: torch.dot(x, x), 1.0)) / 1e9


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} processors"


def one_token_table(types: list[str], tiers: list[str], thread_counts: list[int], mib: int) -> None:
    n_bytes = mib << 20
    print(f"{processor()}; {N_OUT} x {N_IN} matrices, stacks of {mib} MiB, GB/s of weights, one token")
    print(f"{'type':8} {'tier':7} {'threads':>7} {'cache':>7} {'memory':>7} {'float mode':>11}")
    for name in types:
        weight = stack_of_blocks(BY_NAME[name], n_bytes)
        cached = QuantTensor(weight.data[:1].expand(64, -1, -1), weight.type, N_IN)
        for tier in tiers:
            _cpu.set_tier(tier)
            for threads in thread_counts:
                integers, floats = CpuKernels(threads), CpuKernels(threads, float_activations=True)
                rates = [linear_rate(integers, cached), linear_rate(integers, weight), linear_rate(floats, weight)]
                print(f"{name:8} {tier:7} {threads:7} {rates[0]:7.1f} {rates[1]:7.1f} {rates[2]:11.1f}", flush=True)
    for threads in thread_counts:
        print(f"read bandwidth, {threads} threads: {read_bandwidth(threads, n_bytes):.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(BY_NAME))
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    parser.add_argument("--tiers", default=",".join(available_tiers()[1:] or available_tiers()))
    parser.add_argument("--mib", type=int, default=192, help="size of a stack; several times the last level cache")
    parser.add_argument("--tokens", default="8,32,128,512", help="token counts of the second table")
    parser.add_argument("--skip-one", action="store_true", help="only the second table")
    args = parser.parse_args()
    thread_counts = sorted({int(n) for n in args.threads.split(",")})
    types, tiers = args.types.split(","), args.tiers.split(",")
    if not args.skip_one:
        one_token_table(types, tiers, thread_counts, args.mib)
    many_token_table(types, tiers, thread_counts, [int(n) for n in args.tokens.split(",")])


if __name__ == "__main__":
    main()
