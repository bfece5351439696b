"""Prompt speed of full-size models with part of their experts in VRAM, with checks, on a CUDA machine.

    python bench/bench_prefill.py --work /tmp/models --out bench/results/prefill.json [--only qwen3-30b-a3b] [--tiny]

Writes random models of the real shapes. A first check compares the logits of a prompt with those of the engine that
computes expert by expert in f32. The bound of a row is max(bytes streamed / PCIe rate, operations / rate of a bf16
matrix product), both rates measured in the run. The GPU is idle while no kernel runs, by torch's profiler afterwards.
`--tiny` is a dry run on the simulated device.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import LITE, QWEN, V3, begun, by_model, keep, options_of
from gpu_watch import GpuWatch
from prediction import CpuNow, HostNow, SeenPrompt, Used, predicted
from torch import Tensor

from moe_engine import Engine
from moe_engine.calibrate_gpu import large_layers
from moe_engine.config import format_size
from moe_engine.decode_step import PROMPT_TOKENS
from moe_engine.expert_cache import CachedExperts
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.inspection import inspect_file
from moe_engine.layers import MixtureOfExperts
from moe_engine.stats import PromptCounts


@dataclass(frozen=True)
class Setting:
    model: str
    cache: float | str  # share of the experts, or bytes as text
    targets: dict[int, float | None]  # tokens/s by prompt length

    @property
    def name(self) -> str:
        cached = self.cache if isinstance(self.cache, str) else f"{self.cache:.0%}"
        return f"{self.model} {cached} cached"


@dataclass(frozen=True)
class Run:
    """A prompt: seconds, seconds that launches took around it, what it counted if it was streamed, and which experts it
    has used."""

    seconds: float
    launches: float
    counts: PromptCounts
    used: Used


CURVE: dict[int, float | None] = dict.fromkeys([1, 2, 4, 16, 32, 64, 128, 256, 1024])
TARGETS: dict[int, float | None] = {8: 150, 31: 350, 512: 1850, 2048: 6500, 4096: 12500, 8192: 22000, 16384: 28000}
SETTINGS = [
    Setting(QWEN, "1GiB", dict(sorted((CURVE | TARGETS).items()))),
    Setting(QWEN, 0.5, {512: None, 2048: 10000, 8192: None}),
    Setting(QWEN, 1.0, {512: None, 2048: 20000, 8192: None}),
    Setting(LITE, 0.0, {8: None, 512: None, 2048: 9000, 8192: None}),
    Setting(LITE, 1.0, {512: None, 2048: 22000, 8192: None}),
    Setting(V3, "1GiB", {8: None, 31: None, 512: None, 2048: None, 4096: None, 8192: None, 16384: None}),
]


BUSY_FROM = 512  # tokens of prompts of which is measured how long kernels run
WARM_SECONDS = 1.5  # a machine that has just loaded is slow at first


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large bf16 product."""
    n = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    del a, b
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the VRAM of the engines is watched
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def operations(engine: Engine, n: int) -> float:
    """Of a prompt's products and attention."""
    dense = sum(
        2.0 * torch.Size(info.shape).numel()
        for info in engine.file.tensors.values()
        if len(info.shape) == 2 and info.name.startswith("blk.") and "_exps" not in info.name
    )
    experts = engine.experts
    assert isinstance(experts, CachedExperts)
    chosen = sum(6.0 * layout.hidden * layout.n_ff * engine.model.router.top_k for layout in experts.layouts)
    n_head = engine.model.meta.integer("attention.head_count")
    values = sum(sum(shape[-1] for shape in layer) for layer in engine.model.kv_shapes)
    return n * (dense + chosen) + n * n * n_head * values  # half of the scores are masked


def prompt(n: int, seed: int) -> list[int]:
    return [seed, *((i * 7919 + seed) % 400 for i in range(n))]


def check(path: Path, device: str, n: int) -> float:
    """Relative error of the logits against products in f32, expert by expert."""
    options: dict[str, Any] = {"device": device, "experts": "cache", "ctx": 64, "cache_slots": 24, "profile": False}
    ids = prompt(n - 1, 1)
    with Engine.load(path, **options) as engine:
        found = engine.forward(ids)
    with Engine.load(path, activations="float", **options) as engine:
        exact = engine.forward(ids)
    return float((found - exact).norm() / exact.norm())


def measure(
    path: Path, setting: Setting, device: str, rate: float, repeats: int, cpu: CpuNow, host: HostNow | None
) -> list[dict[str, Any]]:
    longest = max(setting.targets)
    options: dict[str, Any] = {"device": device, "experts": "cache", "ctx": longest + 24, "ubatch": longest + 8}
    options |= {"profile": False}
    plan, found = Engine.plan(path, **options), inspect_file(path)
    if isinstance(setting.cache, str):
        options |= {"vram_budget": plan.budget - plan.slots + (1 << 30)}
    elif setting.cache == 0:
        options |= {"cache_slots": 8, "vram_budget": plan.budget - plan.slots + (1 << 30)}
    else:
        cached = int(setting.cache * found.routed_bytes) + 3 * sum(found.expert_bytes)
        options |= {"vram_budget": plan.budget - plan.slots + cached}
    rows = []
    seen: dict[int, SeenPrompt] = {}
    watch = GpuWatch.of(device)
    with watch, Engine.load(path, **options) as engine:
        experts = engine.experts
        assert isinstance(experts, CachedExperts)
        assert experts.prompt is not None
        while experts.store.is_locking:
            time.sleep(0.1)
        started = time.perf_counter()
        while device == "cuda" and time.perf_counter() - started < WARM_SECONDS:
            engine.generate(prompt(min(512, longest), 0), max_tokens=16)
        hardware = engine.hardware
        for n in setting.targets:
            for seed in range(2):
                engine.generate(prompt(n, seed), max_tokens=0)  # compiles
        runs: dict[int, list[Run]] = {n: [] for n in setting.targets}
        for seed in range(repeats):  # shared hosts are slow for seconds: not all runs of a length one after the other
            for i, (n, of_length) in enumerate(runs.items()):
                ids = prompt(n, 10 + seed * len(runs) + i)  # none begins alike
                of_length.append(run(engine, experts, ids, host))
        for n, target in setting.targets.items():
            middle = sorted(runs[n], key=lambda run: run.seconds)[repeats // 2]
            counts = vars(middle.counts)
            used = middle.used  # random weights use fewer experts than trained ones, and find more in slots
            if used.counts is not None:
                used = replace(used, counts=tokens_by_expert(engine, n))
            seen[n] = SeenPrompt(n / middle.seconds, used, statistics.median(run.launches for run in runs[n]))
            link, gpu = counts["streamed_bytes"] / hardware.pcie, operations(engine, n) / rate
            row = {
                "row": setting.name,
                "prompt": n,
                "target": target,
                "tokens_per_second": n / middle.seconds,
                "seconds": [run.seconds for run in runs[n]],
                "bound_share": max(link, gpu) / middle.seconds,
                "link_seconds": link,
                "gpu_seconds": gpu,
                "counts": counts,
                "budget": options["vram_budget"],
                "slots": experts.n_slot,
                "used": used.as_dict(),
            }
            rows.append(row)
            seconds = middle.seconds
            missed = "" if target is None or n / seconds >= target else " MISSED"
            print(
                f"{setting.name:32} {n:6} tokens {n / seconds:9.0f} tok/s (target {target or '-'}){missed}, "
                f"{seconds * 1e3:8.1f} ms, link {link * 1e3:7.1f}, matrix {gpu * 1e3:6.1f} ms, "
                f"cached {counts['cached']} streamed {counts['streamed']} cpu {counts['cpu']} "
                f"unused {counts['unused']}",
                flush=True,
            )
        reserved = torch.cuda.max_memory_reserved() if device == "cuda" else 0
        print(f"  rates: PCIe {hardware.pcie / 1e9:.1f} GB/s, matrix {rate / 1e12:.0f} TFLOP/s; {experts.prompt.rates}")
    predictions = predicted(path, cpu=cpu, host=host, prompts=seen, **options) or {}
    for row in rows:
        row["predicted"] = predictions.get(f"prompt {row['prompt']}")
        row |= {"peak_nvidia_smi": watch.peak, "nvidia_smi_before": watch.before, "peak_reserved": reserved}
    longer = [row for row in rows if row["prompt"] >= BUSY_FROM] if isinstance(setting.cache, str) else []
    if device == "cuda" and longer:
        for row, busy in zip(longer, busy_seconds(path, options, [row["prompt"] for row in longer]), strict=True):
            row["gpu_idle_share"] = 1 - busy / statistics.median(row["seconds"])
        print("  GPU idle: " + ", ".join(f"{row['prompt']} {row['gpu_idle_share']:.0%}" for row in longer), flush=True)
    if watch.status is not None:
        over = " PEAK OVER BUDGET" if watch.peak > options["vram_budget"] else ""
        print(
            f"  peak {format_size(watch.peak)} of {format_size(options['vram_budget'])}{over}, before "
            f"{format_size(watch.before)}, PyTorch's {format_size(reserved)}",
            flush=True,
        )
    return rows


def run(engine: Engine, experts: CachedExperts, ids: list[int], host: HostNow | None) -> Run:
    assert experts.prompt is not None
    before, n_layer = replace(experts.prompt.counts), len(experts.layouts)
    launches = host.seconds() if host is not None else 0.0
    seconds = engine.generate(ids, max_tokens=0).stats.prompt_seconds
    launches = (launches + host.seconds()) / 2 if host is not None else 0.0
    counts, router = experts.prompt.counts.since(before), engine.model.router
    if experts.holds_all:
        used = Used(router.n_expert, router.n_expert, counts=())
    elif n_used := counts.cached + counts.streamed + counts.cpu:
        used = Used(n_used / n_layer, counts.cached / n_layer, counts=())
    else:
        used = used_by_last_step(engine, n_layer, len(ids) - 1)
    return Run(seconds, launches, counts, used)


def used_by_last_step(engine: Engine, n_layer: int, n_token: int) -> Used:
    """Of a prompt of so many tokens, besides the last one, that went in steps."""
    assert isinstance(engine.decoder, GraphDecoder)
    step, number, n_last = engine.decoder.step, engine.decoder.launched, (n_token - 1) % PROMPT_TOKENS + 1
    ids, slots = step.routing(number, n_last)[0], step.slots_found(number, n_last)
    layers = range(n_layer)
    return Used(
        float(np.mean([len(np.unique(ids[:, layer])) for layer in layers])),
        float(np.mean([len(np.unique(ids[:, layer][slots[:, layer] >= 0])) for layer in layers])),
        counts=None,
    )


def tokens_by_expert(engine: Engine, n: int) -> tuple[int, ...]:
    """That a prompt of n tokens gives the experts of a layer, most first: of as many as the layers use on average."""
    layers, found = [block.ffn for block in engine.model.blk if isinstance(block.ffn, MixtureOfExperts)], []

    def count(ids: Tensor, weights: Tensor) -> None:  # on the host: the VRAM in use is watched
        found.append(np.sort(np.bincount(ids.flatten().cpu().numpy(), minlength=engine.model.router.n_expert))[::-1])

    for layer in layers:
        layer.on_route = count
    for _ in engine.prefill.hidden(prompt(n - 1, 9)):
        pass
    for layer in layers:
        layer.on_route = None
    n_used = round(float(np.mean([np.count_nonzero(counts) for counts in found])))
    means = np.mean(found, axis=0)
    means = means[:n_used] * (means.sum() / means[:n_used].sum())  # layers that use more have longer tails
    return tuple(max(1, round(mean)) for mean in means.tolist())


def busy_seconds(path: Path, options: dict[str, Any], lengths: Sequence[int]) -> list[float]:
    """Of prompts, in which a kernel was running. In a process of its own: who was profiled once may stay slow."""
    command = [sys.executable, __file__, "--busy", json.dumps([str(path), options, list(lengths)])]
    found: list[float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def profiled(path: Path, options: dict[str, Any], lengths: Sequence[int]) -> list[float]:
    from torch.profiler import ProfilerActivity, profile

    seconds = []
    with Engine.load(path, **options) as engine:
        for n in lengths:
            for seed in range(2):
                engine.generate(prompt(n, seed), max_tokens=0)
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                engine.generate(prompt(n, 10), max_tokens=0)
                torch.cuda.synchronize()
            kernels = [event for event in found.events() or () if event.device_type.name == "CUDA"]
            spans = sorted((e.time_range.start, e.time_range.end) for e in kernels if not e.name.startswith("Mem"))
            busy = until = 0.0
            for start, end in spans:  # microseconds; several streams may be at work
                busy += max(0.0, end - max(start, until))
                until = max(until, end)
            seconds.append(busy * 1e-6)
    return seconds


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--lengths", help="only these prompt lengths, with commas")
    parser.add_argument("--repeats", type=int, default=5, help="odd")
    parser.add_argument("--busy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.busy:
        path, engine_options, lengths = json.loads(options.busy)
        print(json.dumps(profiled(Path(path), engine_options, lengths)))
        return
    device = "simulated" if options.tiny else "cuda"
    results = begun("python bench/bench_prefill.py", options) | {"checks": {}}
    with ExitStack() as stack:
        host = None if options.tiny else HostNow(stack.enter_context(large_layers()), torch.device("cuda"))
        cpu, rate = CpuNow(), matrix_rate(torch.device("cpu" if options.tiny else "cuda"))
        for path, settings in by_model(SETTINGS, options):
            model = settings[0].model
            results["checks"][model] = check(path, device, 3 if options.tiny else 40)
            print(f"{model}: logits differ by {results['checks'][model]:.2%} from f32", flush=True)
            for setting in settings:
                wanted = {int(n) for n in options.lengths.split(",")} if options.lengths else set(setting.targets)
                targets = {n: t for n, t in setting.targets.items() if n in wanted}
                if not targets:
                    continue
                one = replace(setting, targets=dict.fromkeys([2]) if options.tiny else targets)
                results["rows"] += measure(path, one, device, rate, options.repeats, cpu, host)
                keep(results, options.out)


if __name__ == "__main__":
    main()
