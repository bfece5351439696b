"""Times the mixture of experts of a prompt, with fused and with separate dequantization.

    python bench/bench_grouped_product.py                              # needs a CUDA device
    python bench/bench_grouped_product.py --shapes qwen3 --tokens 2048 --types Q4_K
    python bench/bench_grouped_product.py --tiny                       # a dry run on any machine, nothing timed

Each method is compared with the f64 reference first, on a few experts of the same widths. TFLOP/s counts gate, up and
down, 6 * n_embd * n_ff operations for each (token, expert) pair. `products`: the two fused kernels alone. `fused` and
`dequantized`: all of `moe_prompt`, with sorting and the weighted sum. Then the products' rate over that of a bf16
torch.matmul of 8192 x 8192 x 8192, and the method that `moe_prompt` takes for gate and up, and for down. All run
inside a CUDA graph; the median of single replays.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_engine.kernels import grouped_product as gp
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.kernels.slot_layout import SlotLayout

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from random_blocks import random_blocks


@dataclass(frozen=True)
class Shape:
    n_embd: int
    n_ff: int
    n_expert: int
    top_k: int


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8),  # Qwen3-30B-A3B
    "dsv2lite": Shape(2048, 1408, 64, 6),  # DeepSeek-V2-Lite
    "dsv3": Shape(7168, 2048, 32, 1),  # DeepSeek-V3: an eighth of its experts, with as many rows each
}
TOKENS = (16, 64, 256, 1024, 2048, 8192)
METHODS: tuple[gp.Method, ...] = ("fused", "dequantized")


def layout_of(name: str, shape: Shape) -> SlotLayout:
    """Gate and up of the type, down too: or Q8_0 where its rows cannot be cut into blocks of 256."""
    type = BY_NAME[name]
    down = type if shape.n_ff % type.block_size == 0 else BY_NAME["Q8_0"]
    return SlotLayout.of(type, type, down, shape.n_embd, shape.n_ff)


def random_pool(layout: SlotLayout, n_slot: int, device: torch.device) -> Tensor:
    """Slots that repeat four random experts."""
    rng = np.random.default_rng(0)
    data = np.empty((min(4, n_slot), layout.slot_bytes), dtype=np.uint8)
    for part in (layout.gate, layout.up, layout.down):
        blocks = random_blocks(part.type, len(data) * part.n_out, part.n_in, rng)
        data[:, part.offset : part.offset + part.nbytes] = blocks.reshape(len(data), -1)
    return torch.from_numpy(data).to(device).repeat(-(-n_slot // len(data)), 1)[:n_slot].contiguous()


def random_input(shape: Shape, n_token: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, the ids of random experts, weights."""
    generator = torch.Generator().manual_seed(n_token)
    x = torch.randn(n_token, shape.n_embd, generator=generator) / shape.n_embd**0.5
    ids = torch.rand(n_token, shape.n_expert, generator=generator).topk(shape.top_k).indices.int()
    return x.to(torch.bfloat16).to(device), ids.to(device), torch.rand(ids.shape, generator=generator).to(device)


def check(layout: SlotLayout, shape: Shape, device: torch.device, n_token: int) -> dict[str, float]:
    """The relative error of each method with three experts. Exits where it is 1e-2 or more."""
    few = Shape(shape.n_embd, shape.n_ff, 3, 2)
    pool, slots = random_pool(layout, 3, device), torch.arange(3, dtype=torch.int32, device=device)
    x, ids, weights = random_input(few, n_token, device)
    expected = gp.moe_prompt_reference(x, ids, weights, slots, pool, layout)
    errors: dict[str, float] = {}
    for method in METHODS:
        out = gp.moe_prompt(x, ids, weights, slots, pool, layout, method).cpu().double()
        errors[method] = ((out - expected).norm() / expected.norm()).item()
        if not errors[method] < 1e-2:
            raise SystemExit(f"{layout.gate.type}: {method} differs from the reference by {errors[method]:.2e}")
    return errors


def median_ms(run: Callable[[], object], replays: int = 15) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    for replay in range(replays + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if replay >= 3:
            times.append(float(start.elapsed_time(stop)))
    return statistics.median(times)


def matmul_rate(device: torch.device) -> float:
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9


def measure(name: str, type_name: str, n_token: int, device: torch.device, peak: float) -> dict[str, Any]:
    shape = SHAPES[name]
    layout = layout_of(type_name, shape)
    pool = random_pool(layout, shape.n_expert, device)
    slots = torch.arange(shape.n_expert, dtype=torch.int32, device=device)
    x, ids, weights = random_input(shape, n_token, device)
    pairs = gp.sort_by_expert(ids, slots)

    def products() -> Tensor:
        h = gp.grouped_gate_up(x, pairs.token, pairs.groups, pool, layout.gate, layout.up)
        return gp.grouped_down(h, pairs.groups, pool, layout.down)

    milliseconds = {"products": median_ms(products)}
    for method in METHODS:
        milliseconds[method] = median_ms(lambda m=method: gp.moe_prompt(x, ids, weights, slots, pool, layout, m))  # type: ignore[misc]
    operations = 6 * shape.n_embd * shape.n_ff * ids.numel()
    rates = {key: operations / ms / 1e9 for key, ms in milliseconds.items()}
    chosen = [gp.choose_method(part, pool) for part in (layout.gate, layout.down)]
    row = f"{name:9} {type_name:8} {n_token:6}" + "".join(f"{milliseconds[k]:9.3f}{rates[k]:7.0f}" for k in rates)
    print(f"{row} {rates['products'] / peak:7.0%} {' '.join(chosen)}", flush=True)
    return {"shape": name, "type": type_name, "tokens": n_token, "ms": milliseconds, "tflops": rates, "chosen": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="check on small matrices, without timing")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--types", nargs="+", choices=BY_NAME, default=["Q4_K", "Q6_K", "Q8_0"], metavar="TYPE")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.tiny:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
        shape = Shape(256, 256, 3, 2)
        for name in arguments.types:
            print(name, {k: f"{v:.1e}" for k, v in check(layout_of(name, shape), shape, device, 5).items()})
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --tiny runs here")
    device = torch.device("cuda")
    peak = matmul_rate(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16 matmul {peak:.0f} TFLOP/s")
    print(f"{'shape':9} {'type':8} {'tokens':>6}" + "".join(f"{k + ' ms':>12} TF/s" for k in ("products", *METHODS)))
    rows = []
    for name in arguments.shapes:
        for type_name in arguments.types:
            errors = check(layout_of(type_name, SHAPES[name]), SHAPES[name], device, 200)
            for n_token in arguments.tokens:
                rows.append(measure(name, type_name, n_token, device, peak) | {"errors": errors})
    if arguments.json:
        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "matmul": peak, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
