"""Decode speed of full-size models under VRAM budgets, with checks, on a CUDA machine.

    python bench/bench_decode.py --work /tmp/models --out bench/results/decode.json [--only qwen3-30b-a3b] [--tiny]

Writes random models of the real shapes, loads each with a given share of its experts in VRAM, and decodes after a
512-token prompt. Random weights do not route as trained ones do, so rows marked "trace" follow recorded routing of a
trained model (data/routing.npz: 12 layers, 64 experts, top-8, and what was predicted of each layer) in place of the
router's choice; see benchmark/routing.py. bench_lookahead.py compares such rows with and without what is predicted.
`--tiny` is a dry run on the simulated device with few layers.
"""

import platform
import statistics
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import LITE, QWEN, ROUTING, V3, begun, by_model, keep, options_of, vram_budget
from gpu_watch import GpuStatus, GpuWatch
from prediction import CpuNow, predicted

from moe_engine import Engine
from moe_engine.benchmark.routing import RecordedRouting
from moe_engine.config import format_size
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.stats import Stats


@dataclass(frozen=True)
class Row:
    model: str
    share: float  # of the experts in VRAM
    routing: str  # "own" or "trace"
    target: float | None = None  # tokens/s
    batch: int = 1
    miss: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.model} {self.share:.0%} {self.routing} batch {self.batch} {self.miss}"


SOAK_PARTS = 12  # whose peaks of memory are kept, to see when it grew

ROWS = [
    Row(QWEN, 0.0, "own", 80),
    Row(QWEN, 0.25, "trace", 135),
    Row(QWEN, 0.25, "own", 260),
    Row(QWEN, 0.5, "trace", 215),
    Row(QWEN, 0.5, "own", 370),
    Row(QWEN, 1.0, "own", 430),
    Row(QWEN, 0.0, "own", batch=4),
    Row(QWEN, 0.0, "own", batch=8),
    Row(QWEN, 0.5, "trace", batch=4),
    Row(QWEN, 0.5, "trace", batch=8),
    Row(QWEN, 1.0, "own", batch=4),
    Row(QWEN, 1.0, "own", batch=8),
    Row(QWEN, 0.25, "trace", miss="cpu"),
    Row(QWEN, 0.25, "trace", miss="fetch"),
    Row(LITE, 0.0, "own", 90),
    Row(LITE, 0.25, "trace", 150),
    Row(LITE, 1.0, "own", 460),
    Row(LITE, 0.25, "trace", batch=4),
    Row(LITE, 0.25, "trace", batch=8),
    Row(V3, 0.0, "own", 105),
]


def run(path: Path, row: Row, device: str, cpu: CpuNow, n_prompt: int, n_decode: int, repeats: int) -> dict[str, Any]:
    """Loads the model as the row says, decodes, checks the books and the peak."""
    options: dict[str, Any] = {
        "device": device,
        "experts": "cpu" if row.share == 0 else "cache",
        "n_sequence": row.batch,
        "ctx": n_prompt + n_decode + 8,
        "miss": row.miss,
    }
    budget = vram_budget(path, row.share, **options)
    watch = GpuWatch.of(device)
    with watch:
        started = time.perf_counter()
        with Engine.load(path, vram_budget=budget, profile=False, **options) as engine:
            loaded = time.perf_counter() - started
            decoder = engine.decoder
            assert isinstance(decoder, GraphDecoder)
            if row.routing == "trace":
                RecordedRouting.load(ROUTING).follow(decoder.step)
            prompts = [[(i * 7919 + 31 * b) % 400 for i in range(n_prompt)] for b in range(row.batch)]
            stats: list[Stats] = []
            for repeat in range(repeats + 1):
                result = engine.generate_batch(prompts, temperature=0, max_tokens=n_decode)[0]
                if repeat > 0:  # the first compiles, captures, fills the cache
                    stats.append(result.stats)
            timeline = timeline_of(decoder)
            decoder.worker.settle()
            decoder.worker.check_integrity()
            hardware = engine.hardware
            del decoder
    torch.cuda.empty_cache() if device == "cuda" else None
    rates = [each.decode_rate or 0.0 for each in stats]
    middle = stats[rates.index(statistics.median_low(rates))]
    found: dict[str, Any] = {
        "row": row.name,
        "target": row.target,
        "tokens_per_second": statistics.median(rates),
        "all": rates,
        "bound_share": middle.bound.share if middle.bound else None,
        "budget": budget,
        "peak_nvidia_smi": watch.peak,
        "load_seconds": loaded,
        "hardware": vars(hardware),
        "timeline": timeline,
        "stats": {k: v for k, v in middle.as_dict().items() if not k.startswith("layer_")},
    }
    print(summary(found, middle), flush=True)
    found["predicted"] = predicted(
        path,
        cpu=cpu,
        decode=statistics.median(rates),
        hit_rate=middle.hit_rate if row.routing == "own" else None,
        context=n_prompt + n_decode // 2,
        vram_budget=budget,
        **options,
    )
    if watch.peak > budget:
        print(f"  PEAK OVER BUDGET by {format_size(watch.peak - budget)}", flush=True)
    return found


def summary(found: dict[str, Any], stats: Stats) -> str:
    steps, bound = max(1, stats.steps), stats.bound
    assert bound is not None
    return (
        f"{found['row']:40} {found['tokens_per_second']:7.1f} tok/s (target {found['target'] or '-'}), hits "
        f"{stats.hit_rate or 0:.1%}, {bound.share:.0%} of the bound; a step: {bound.step_seconds * 1e3:.2f} ms, VRAM "
        f"{bound.vram_seconds * 1e3:.2f}, misses {bound.miss_seconds * 1e3:.2f}, GPU waited "
        f"{stats.gpu_wait_seconds / steps * 1e3:.2f}, CPU {stats.cpu_seconds / steps * 1e3:.2f}; fetched "
        f"{stats.fetched_now} now, {stats.fetched_ahead} ahead, {stats.fetches_wasted} wasted; peak "
        f"{format_size(found['peak_nvidia_smi'])} of {format_size(found['budget'])}; {found['timeline']}"
    )


def soak(path: Path, seconds: float) -> dict[str, Any]:
    """Random prompts on a small cache for a while: no error, and memory must not grow."""
    options: dict[str, Any] = {"device": "cuda", "experts": "cache", "ctx": 1024}
    used, ram, tokens = [], [], 0
    with Engine.load(path, vram_budget=vram_budget(path, 0.1, **options), profile=False, **options) as engine:
        status, random = GpuStatus(), np.random.default_rng(0)
        engine.generate(list(range(512)), max_tokens=1)  # loads the kernels of streaming, which short ones rarely need
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            prompt = random.integers(0, 400, random.integers(1, 40)).tolist()
            greedy = bool(random.integers(2))
            result = engine.generate(prompt, max_tokens=int(random.integers(1, 200)), temperature=0 if greedy else 0.8)
            tokens += len(result.tokens)
            used.append(status.used())
            ram.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        assert isinstance(engine.decoder, GraphDecoder)
        engine.decoder.worker.settle()
        engine.decoder.worker.check_integrity()
    third = len(used) // 3
    found = {
        "seconds": seconds,
        "tokens": tokens,
        "generations": len(used),
        "vram_growth": max(used[third:]) - max(used[:third]),
        "ram_growth": max(ram[third:]) - max(ram[:third]),
        "vram": [int(max(part)) for part in np.array_split(used, SOAK_PARTS)],
        "ram": [int(max(part)) for part in np.array_split(ram, SOAK_PARTS)],
    }
    print(f"soak: {found}", flush=True)
    return found


def timeline_of(decoder: GraphDecoder) -> dict[str, float]:
    """Medians in microseconds over the last messages."""
    entries = decoder.worker.timeline()
    missed = entries[entries["answered"] > 0]
    if len(entries) < 2:  # nothing can miss, and nothing is posted
        return {}
    gaps = np.diff(entries["seen"])
    found = {"between_messages": float(np.median(gaps)) * 1e-3}
    if len(missed):
        computed = missed[missed["begun"] > 0]
        spans = [
            ("answer", missed["answered"] - missed["seen"]),
            ("before_computing", computed["begun"] - computed["seen"]),
            ("computing", computed["computed"] - computed["begun"]),
            ("behind_computing", computed["answered"] - computed["computed"]),
        ]
        found |= {name: float(np.median(span)) * 1e-3 for name, span in spans if len(span)}
        found["experts"] = float(np.mean(missed["n_cpu"] + missed["n_now"]))
        found["missing_layers"] = len(missed) / len(entries)
        after = entries["seen"][1:] - entries["answered"][:-1]
        found["answered_to_next"] = float(np.median(after[entries["answered"][:-1] > 0])) * 1e-3
    return found


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of random prompts on a small cache at the end")
    options = parser.parse_args()
    device = "simulated" if options.tiny else "cuda"
    results = begun("python bench/bench_decode.py", options)
    results |= {"python": platform.python_version()}
    cpu = CpuNow()
    for path, rows in by_model(ROWS, options):
        for row in rows:
            try:
                sizes = (4, 3, 1) if options.tiny else (512, options.tokens, options.repeats)
                results["rows"].append(run(path, row, device, cpu, *sizes))
            except Exception as error:  # the other rows are still worth having
                traceback.print_exc(limit=-4)
                results["rows"].append({"row": row.name, "error": f"{type(error).__name__}: {error}"})
            keep(results, options.out)
        if options.soak and rows[0].model == QWEN:
            results["soak"] = soak(path, options.soak)
            keep(results, options.out)


if __name__ == "__main__":
    main()
