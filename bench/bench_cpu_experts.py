"""One layer's routed experts on the CPU: microseconds, gigabytes of weights a second, share of the memory's rate.

    python bench/bench_cpu_experts.py --types Q4_K,Q6_K --shapes qwen3-30b --tokens 1 --threads 1,2
    python bench/bench_cpu_experts.py --json cpu_experts.json --ggml-lib DIR
    python bench/bench_cpu_experts.py --tiny      # a dry run: small shapes, few calls

Every call draws its experts anew from a pool of experts far larger than the last-level cache. A weight counts once a
call, however many tokens use it. The memory's rate is that of a loop on the same threads that only reads the same
stacks, in turns with the calls: the median of a row's own turns. Where llama.cpp's libraries are found (in an installed
llama-cpp-python, or in the folder of --ggml-lib), its CPU backend computes the same layer from the same bytes for the
same tokens and experts, in turns with ours, and the results are compared. Times are medians, of calls of the library
itself, as the decode worker makes them: what Python's checks cost is not in them. With --rounds all is measured so many
times over, and each number is the median: shared hosts change their speed within seconds.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cpu_kernels import processor
from ggml_layer import Ggml, GgmlLayer, find_folder
from rich.console import Console
from rich.table import Table

from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle, host_buffer
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QuantType

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from random_blocks import random_blocks


@dataclass(frozen=True)
class Shape:
    hidden: int
    n_ff: int
    top_k: int


SHAPES = {
    "qwen3-30b": Shape(2048, 768, 8),
    "deepseek-v2-lite": Shape(2048, 1408, 6),
    "deepseek-v3": Shape(7168, 2048, 8),
}
TINY = {"tiny": Shape(256, 512, 2)}
TOKENS = (1, 2, 4, 8, 32, 512)


@dataclass
class Row:
    """One measurement. `llama_us` and `difference` (relative, of the two outputs) only where llama.cpp ran."""

    shape: str
    type: str
    tokens: int
    threads: int
    us: float
    gb_s: float
    read_gb_s: float = 0.0
    share: float = 0.0
    llama_us: float | None = None
    speedup: float | None = None
    difference: float | None = None


@dataclass
class Job:
    """The inputs of one call."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        return self.x.data_ptr(), self.ids.data_ptr(), self.weights.data_ptr()


def pool_of_experts(type: QuantType, shape: Shape, n_bytes: int) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
    """Experts that take about n_bytes, as those of all layers of a model together; all hold the same blocks."""
    one = 3 * type.row_bytes(shape.hidden) * shape.n_ff
    n_expert = max(shape.top_k, n_bytes // one)
    rng = np.random.default_rng(0)

    def stack(n_out: int, n_in: int) -> QuantTensor:
        rows = random_blocks(type, n_out, n_in, rng)
        data = host_buffer(n_expert * rows.size).view(n_expert, *rows.shape)
        data[:] = torch.from_numpy(rows)
        return QuantTensor(data, type, n_in)

    return stack(shape.n_ff, shape.hidden), stack(shape.n_ff, shape.hidden), stack(shape.hidden, shape.n_ff)


def draw_jobs(n: int, handle: ExpertHandle, n_tokens: int, top_k: int) -> list[Job]:
    rng = np.random.default_rng(1)
    ids = [np.stack([rng.choice(handle.n_expert, top_k, replace=False) for _ in range(n_tokens)]) for _ in range(n)]
    x = torch.from_numpy(rng.standard_normal((n_tokens, handle.hidden), dtype=np.float32)) * 0.01
    weights = torch.full((n_tokens, top_k), 1 / top_k)
    return [Job(x, torch.from_numpy(i), weights) for i in ids]


def times(call: Callable[[Job], object], jobs: list[Job]) -> list[float]:
    seconds = []
    for job in jobs:
        before = time.perf_counter()
        call(job)
        seconds.append(time.perf_counter() - before)
    return seconds


class Reader:
    """Reads the stacks of a layer, another one each time."""

    def __init__(self, handle: ExpertHandle) -> None:
        self.data = [w.data for w in (handle.gate, handle.up, handle.down)]
        self.turn = 0

    def __call__(self, pool: _cpu.ThreadPool) -> float:
        """Gigabytes per second, with or without asking for memory in advance, whichever is faster."""
        rates = []
        for prefetch in (0, 8192):
            data = self.data[self.turn % 3]
            self.turn += 1
            before = time.perf_counter()
            _cpu.read_memory(pool, data.data_ptr(), data.numel(), prefetch)
            rates.append(data.numel() / (time.perf_counter() - before) / 1e9)
        return max(rates)


def measure(
    handle: ExpertHandle, shape: Shape, kernels: CpuKernels, ggml: Ggml | None, n_tokens: int, least: float
) -> tuple[Row, float]:
    """One row, without names and shares, and the read rate beside it. least: seconds for either side."""
    # One round goes through about all experts, so that none is still in a cache when its turn comes again.
    n_jobs = max(2, handle.n_expert // min(handle.n_expert, n_tokens * shape.top_k))
    jobs = draw_jobs(n_jobs, handle, n_tokens, shape.top_k)
    layer = GgmlLayer(ggml, handle, n_tokens, shape.top_k, kernels.threads) if ggml else None

    out = torch.empty(n_tokens, shape.hidden)
    address = out.data_ptr()

    def ours(job: Job) -> None:
        x, ids, weights = job.addresses
        _cpu.expert_ffn(kernels.pool, handle.layer, x, n_tokens, ids, shape.top_k, weights, address, False)

    def theirs(job: Job) -> None:
        assert layer is not None
        layer(job.x, job.ids, job.weights)

    difference = None
    if layer is not None:
        theirs(jobs[-1])
        expected = torch.from_numpy(layer.out.copy())
        ours(jobs[-1])
        difference = float((out.view(-1) - expected).norm() / expected.norm())
    times(ours, jobs)
    reader = Reader(handle)
    our_times: list[float] = []
    their_times: list[float] = []
    rates: list[float] = []
    while sum(our_times) < least or len(our_times) < 3:
        our_times += times(ours, jobs)
        rates.append(reader(kernels.pool))
        if layer is not None and (sum(their_times) < least or len(their_times) < 3):
            their_times += times(theirs, jobs)
            time.sleep(0.005)  # its threads spin for a while after a call
    if layer is not None:
        layer.close()
    seconds = statistics.median(our_times)
    n_active = statistics.mean(len(job.ids.unique()) for job in jobs)
    n_bytes = n_active * sum(w.nbytes / handle.n_expert for w in (handle.gate, handle.up, handle.down))
    row = Row("", handle.gate.type.name, n_tokens, kernels.threads, seconds * 1e6, n_bytes / seconds / 1e9)
    if their_times:
        row.llama_us, row.difference = statistics.median(their_times) * 1e6, difference
        row.speedup = row.llama_us / row.us
    return row, statistics.median(rates)


def medians(rows: Sequence[Row]) -> Row:
    """Of the same row measured several times: each number's median."""
    numbers: dict[str, Any] = {}
    for name in ("us", "gb_s", "read_gb_s", "share", "llama_us", "speedup", "difference"):
        values = [getattr(row, name) for row in rows]
        numbers[name] = None if None in values else statistics.median(values)
    return replace(rows[0], **numbers)


def show(rows: list[Row], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("shape", "type", "T", "threads", "us", "GB/s", "of memory", "llama.cpp us", "speed-up", "difference"):
        table.add_column(name, justify="left" if name in ("shape", "type") else "right")
    for r in rows:
        compared = () if r.llama_us is None else (f"{r.llama_us:.0f}", f"{r.speedup:.2f}", f"{r.difference:.4f}")
        numbers = (str(r.tokens), str(r.threads), f"{r.us:.0f}", f"{r.gb_s:.1f}", f"{r.share:.0%}")
        table.add_row(r.shape, r.type, *numbers, *compared)
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    threads = ",".join(str(n) for n in (1, 2, 4, 8, 16) if n <= cores)
    parser.add_argument("--types", default=",".join(BY_NAME))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--threads", default=threads)
    parser.add_argument("--pool-mib", type=int, default=1024, help="memory of the pool of experts")
    parser.add_argument("--seconds", type=float, default=0.15, help="shortest measurement")
    parser.add_argument("--rounds", type=int, default=1, help="measure everything so many times, and take medians")
    parser.add_argument("--spin", type=int, default=100, help="microseconds that idle threads spin")
    parser.add_argument("--no-pin", action="store_true", help="let the system move the threads")
    parser.add_argument("--ggml-lib", type=Path, default=find_folder(), help="folder of llama.cpp's shared libraries")
    parser.add_argument("--no-ggml", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a small shape")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)  # nothing here uses them
    ggml = Ggml(args.ggml_lib) if args.ggml_lib and not args.no_ggml else None
    if args.tiny:
        args.shapes, args.pool_mib, args.seconds, args.tokens = "tiny", 4, 0.001, "1,5"
    shapes = (TINY if args.tiny else SHAPES) | SHAPES
    pools = [CpuKernels(int(n), spin_microseconds=args.spin, pin=not args.no_pin) for n in args.threads.split(",")]
    rounds: list[list[Row]] = []
    for _ in range(args.rounds):
        rows: list[Row] = []
        rounds.append(rows)
        for shape_name in args.shapes.split(","):
            shape = shapes[shape_name]
            for name in args.types.split(","):
                if shape.n_ff % BY_NAME[name].block_size:
                    continue
                stacks = pool_of_experts(BY_NAME[name], shape, args.pool_mib << 20)
                handle = pools[0].register_experts(*stacks)
                for kernels in pools:
                    for n_tokens in map(int, args.tokens.split(",")):
                        row, rate = measure(handle, shape, kernels, ggml, n_tokens, args.seconds)
                        row.shape, row.read_gb_s, row.share = shape_name, rate, row.gb_s / rate
                        rows.append(row)
    rows = [medians(of_one) for of_one in zip(*rounds, strict=True)]
    show(rows, f"{processor()}, {_cpu.tier()}, a pool of {args.pool_mib} MiB")
    for kernels in pools:
        rates = [row.read_gb_s for row in rows if row.threads == kernels.threads]
        print(
            f"{kernels.threads} threads read {statistics.median(rates):.1f} GB/s, {min(rates):.1f} to {max(rates):.1f}"
        )
    if any(r.speedup for r in rows):
        mean = math.exp(statistics.mean(math.log(r.speedup) for r in rows if r.speedup))
        print(f"llama.cpp's time over ours, geometric mean: {mean:.2f}")
    if args.json:
        result: dict[str, object] = {
            "processor": processor(),
            "tier": _cpu.tier(),
            "pool_mib": args.pool_mib,
            "rounds": args.rounds,
            "rows": [asdict(r) for r in rows],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
