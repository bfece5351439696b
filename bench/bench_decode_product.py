"""Times the decode products: a layer's routed experts (gate, up, SiLU, down, weighted sum) and dense matrices.

    python bench/bench_decode_product.py                                # needs a CUDA device; minutes of compiling
    python bench/bench_decode_product.py --types Q4_K --shapes qwen3-30b-a3b --tokens 1
    python bench/bench_decode_product.py --tiny                         # a dry run on any machine, nothing timed

Times are medians of graph replays. The experts rotate from call to call through a pool far larger than the cache, so
do the copies of a dense matrix. GB/s counts each distinct expert's (or the matrix's) bytes once; "of copy" is its
share of what a device-to-device copy moves in the same run, read + written.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from moe_engine.kernels.decode_product import MoeBuffers, matvec, moe_decode
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QuantType
from moe_engine.kernels.slot_layout import SlotLayout

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from random_blocks import random_blocks

# hidden, n_ff, top_k, slots in the pool
SHAPES = {
    "qwen3-30b-a3b": (2048, 768, 8, 512),
    "deepseek-v2-lite": (2048, 1408, 6, 256),
    "deepseek-v3": (7168, 2048, 8, 64),
    "tiny": (256, 256, 2, 4),
}
# n_out, n_in
MATRICES = {
    "head": (151936, 2048),
    "q": (4096, 2048),
    "kv": (512, 2048),
    "o": (2048, 4096),
    "tiny": (48, 512),
}
FAST_TYPES = ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "MXFP4", "IQ4_XS", "Q5_0", "Q4_0", "Q2_K", "Q3_K"]
CACHE_BYTES = 60 << 20  # of the GPU the constants were chosen on
DISTINCT_EXPERTS = 2  # random blocks take long to draw: the slots repeat these
ROTATION = 16  # products a graph, each on other experts

Row = dict[str, Any]


def median_us(run: Callable[[int], object], n_call: int) -> float:
    """Microseconds of a call inside a graph of `n_call` different ones."""
    for index in range(2):
        run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(n_call):
            run(index)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / n_call)
    return float(statistics.median(times[2:]))


def copy_rate() -> float:
    """GB/s of a device-to-device copy of 2 GiB, read + written."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(2 * source.nbytes / min(times) / 1e6)


def exact_values(data: Tensor, type: QuantType, n_in: int, device: torch.device) -> Tensor:
    floats = quants.dequantize(np.ascontiguousarray(data.cpu().numpy()), GGMLQuantizationType(type.id))
    return torch.tensor(floats, device=device).view(-1, n_in).double()


def check(name: str, actual: Tensor, exact: Tensor, limit: float) -> float:
    error = float((actual.double() - exact).norm() / exact.norm())
    if not error < limit:
        raise SystemExit(f"{name}: relative error {error:.2e}, expected below {limit}")
    return error


def expert_pool(layout: SlotLayout, n_slot: int, device: torch.device) -> Tensor:
    rng = np.random.default_rng(0)
    pool = torch.empty(n_slot, layout.slot_bytes, dtype=torch.uint8, device=device)
    for index in range(DISTINCT_EXPERTS):
        gate = random_blocks(layout.gate.type, layout.n_ff, layout.hidden, rng)
        up = random_blocks(layout.up.type, layout.n_ff, layout.hidden, rng)
        down = random_blocks(layout.down.type, layout.hidden, layout.n_ff, rng)
        expert = torch.from_numpy(np.concatenate([gate.ravel(), up.ravel(), down.ravel()]))
        pool[index::DISTINCT_EXPERTS] = expert.to(device)
    return pool


def measure_moe(shape: str, types: list[QuantType], tokens: list[int], device: torch.device, copy: float) -> list[Row]:
    """types: gate and up, and down."""
    hidden, n_ff, top_k, n_slot = SHAPES[shape]
    layout = SlotLayout.of(types[0], types[0], types[1], hidden, n_ff)
    pool = expert_pool(layout, n_slot, device)
    experts = [[exact_values(p.data, p.type, p.n_in, device) for p in layout.parts(pool[i])] for i in range(2)]
    rows = []
    for n_token in tokens:
        generator = torch.Generator().manual_seed(n_token)
        x = torch.randn(n_token, hidden, generator=generator).to(device) / (5 * hidden**0.5)
        weights = torch.rand(n_token, top_k, generator=generator).to(device)
        # Distinct experts for a token; tokens share some, as they fall
        permutations = [torch.randperm(n_slot, generator=generator)[:top_k] for _ in range(ROTATION * n_token)]
        if n_token == 1:  # calls in turn through the whole pool
            start = torch.arange(ROTATION * top_k) % n_slot
            permutations = list(start.view(ROTATION, top_k))
        slots = torch.stack(permutations).view(ROTATION, n_token, top_k).to(torch.int32).to(device)
        buffers = MoeBuffers.empty(layout, n_token, top_k, device)
        out = torch.empty(n_token, hidden, device=device)
        exact = torch.zeros(n_token, hidden, dtype=torch.float64, device=device)
        for token in range(n_token):
            for choice, slot in enumerate(slots[0, token].tolist()):
                gate, up, down = experts[slot % DISTINCT_EXPERTS]
                h = torch.nn.functional.silu(gate @ x[token].double()) * (up @ x[token].double())
                exact[token] += weights[token, choice].double() * (down @ h)
        name = f"{shape} {types[0]}/{types[1]} T={n_token}"
        error = check(name, moe_decode(x, pool, layout, slots[0], weights, out, buffers), exact, 1.5e-2)
        row: Row = {"what": "moe", "shape": shape, "type": f"{types[0]}/{types[1]}", "tokens": n_token, "error": error}
        if device.type == "cuda":

            def run(index: int, x: Tensor = x, slots: Tensor = slots, weights: Tensor = weights) -> Tensor:
                return moe_decode(x, pool, layout, slots[index], weights, out, buffers)  # noqa: B023

            row["us"] = median_us(run, ROTATION)
            distinct = statistics.mean(len(set(s.flatten().tolist())) for s in slots)
            row["gbps"] = distinct * layout.slot_bytes / row["us"] / 1e3
            row["of_copy"] = row["gbps"] / copy
        rows.append(row)
        show(row)
    return rows


def measure_matrix(shape: str, type: QuantType, tokens: list[int], device: torch.device, copy: float) -> list[Row]:
    n_out, n_in = MATRICES[shape]
    rng = np.random.default_rng(0)
    few = torch.from_numpy(random_blocks(type, 1024 if n_out > 1024 else n_out, n_in, rng)).to(device)
    data = few.repeat(-(-n_out // len(few)), 1)[:n_out].contiguous()
    n_copy = 1 if device.type == "cpu" else max(1, min(ROTATION, 8 * CACHE_BYTES // data.numel() + 1))
    copies = [QuantTensor(data.clone(), type, n_in) for _ in range(n_copy)]
    rows = []
    for n_token in tokens:
        x = torch.randn(n_token, n_in, generator=torch.Generator().manual_seed(n_token)).to(device)
        out = torch.empty(n_token, n_out, device=device)
        exact = (x.double() @ exact_values(few, type, n_in, device).T).repeat(1, -(-n_out // len(few)))[:, :n_out]
        error = check(f"{shape} {type} T={n_token}", matvec(x, copies[0], out), exact, 1e-2)
        row: Row = {"what": "matrix", "shape": shape, "type": type.name, "tokens": n_token, "error": error}
        if device.type == "cuda":

            def run(index: int, x: Tensor = x, out: Tensor = out) -> Tensor:
                return matvec(x, copies[index % n_copy], out)

            row["us"] = median_us(run, max(n_copy, 4))
            row["gbps"] = data.numel() / row["us"] / 1e3
            row["of_copy"] = row["gbps"] / copy
        rows.append(row)
        show(row)
    return rows


def show(row: Row) -> None:
    line = f"{row['what']:7} {row['shape']:17} {row['type']:12} {row['tokens']:3} {row['error']:9.1e}"
    if "us" in row:
        line += f" {row['us']:9.1f} {row['gbps']:8.0f} {row['of_copy']:7.0%}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="check small shapes without timing")
    parser.add_argument("--types", nargs="*", metavar="TYPE[/DOWN]", default=FAST_TYPES, help="of gate and up, of down")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES)[:3])
    parser.add_argument("--matrices", nargs="*", choices=list(MATRICES), default=list(MATRICES)[:4])
    parser.add_argument("--matrix-types", nargs="*", metavar="TYPE", default=["Q4_K", "Q6_K", "Q8_0"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, matrices = arguments.shapes, arguments.matrices
    copy = 0.0
    if arguments.tiny:
        shapes, matrices = ["tiny"], ["tiny"]
        if device.type == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
    elif device.type == "cuda":
        copy = copy_rate()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.0f} GB/s")
    else:
        raise SystemExit("no CUDA device: only --tiny runs here")
    head = f"{'what':7} {'shape':17} {'type':12} {'T':>3} {'error':>9}"
    print(head if arguments.tiny else f"{head} {'us':>9} {'GB/s':>8} {'of copy':>7}")
    rows: list[Row] = []
    for shape in shapes:
        for types in arguments.types:
            gate, _, down = types.partition("/")
            pair = [BY_NAME[gate], BY_NAME[down or gate]]
            if SHAPES[shape][1] % pair[1].block_size:  # files then hold another type there
                pair[1] = BY_NAME["Q8_0"]
            rows += measure_moe(shape, pair, arguments.tokens, device, copy)
    for shape in matrices:
        for name in arguments.matrix_types:
            rows += measure_matrix(shape, BY_NAME[name], arguments.tokens, device, copy)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"copy_gbps": copy, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
