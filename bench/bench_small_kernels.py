"""Times the small kernels (norm, rotation, router, decode attention) inside CUDA graphs.

    python bench/bench_small_kernels.py            # needs a CUDA device
    python bench/bench_small_kernels.py --tiny     # a dry run on any machine, nothing timed

Every number is the time of one call: the median over replays of a graph of many calls, divided by their number. The
calls rotate over copies of what they read, so that the last-level cache does not hold it. Each kernel is compared with
its reference first. Attention's GB/s counts the cached bytes, read once; the share is of a device-to-device copy in
the same run (read + written). torch: the reference in a graph; for attention SDPA over the f16 cache, not rotated.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():  # must be known before the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from moe_engine.kernels.attention import attention
from moe_engine.kernels.decode_attention import decode_attention
from moe_engine.kernels.norm_rope import (
    Cache,
    Q8Cache,
    cached_floats,
    latent_norm_rope_append,
    qk_norm_rope_append,
    quantize_reference,
    rms_norm,
    rms_norm_reference,
    rope_reference,
)
from moe_engine.kernels.router import RouterConfig, route
from moe_engine.kernels.router_kernel import route_and_lookup

torch.manual_seed(0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
CACHE_BYTES = 160 << 20  # what a graph's calls read in all, at least: more than twice an H200's last-level cache
Call = Callable[[], Any]
Pair = tuple[Cache, Cache | None]  # without values: latent


class Router(NamedTuple):
    name: str
    hidden: int
    config: RouterConfig
    has_bias: bool = False


class Heads(NamedTuple):
    name: str
    n_head: int
    n_kv: int  # 0: latent
    d: int
    d_value: int


ROUTERS = (
    Router("Qwen3-30B-A3B", 2048, RouterConfig(128, 8, "softmax", True)),
    Router("DeepSeek-V2-Lite", 2048, RouterConfig(64, 6)),
    Router("DeepSeek-V3", 7168, RouterConfig(256, 8, "sigmoid", True, 2.5, 8, 4, "top2_sum"), True),
)
HEADS = (
    Heads("Qwen3-30B-A3B", 32, 4, 128, 128),
    Heads("DeepSeek-V2-Lite", 16, 0, 576, 512),
    Heads("DeepSeek-V3", 128, 0, 576, 512),
)
TINY_HEADS = (Heads("tiny", 4, 2, 64, 64), Heads("tiny MLA", 4, 0, 96, 64))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def int32(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=DEVICE)


def microseconds(calls: list[Call], least: int = 20, replays: int = 15) -> float:
    """Median time of one of `calls`, replayed in turn in a graph of at least `least`."""
    calls = calls * -(-least // len(calls))
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / len(calls))
    return statistics.median(times[2:])


def check(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not error < tolerance:
        raise SystemExit(f"{name}: relative error {error:.1e}, expected less than {tolerance:.0e}")
    return error


def copies(n_bytes: int, tiny: bool) -> int:
    return 1 if tiny else max(1, -(-CACHE_BYTES // n_bytes))


class Report:
    """Rows of results, printed as they come."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.rows: list[dict[str, Any]] = []
        self.copy_rate = 0.0  # GB/s

    def add(
        self, kernel: str, calls: list[Call], reference: Call | None = None, n_bytes: int = 0, error: float = 0.0
    ) -> None:
        row: dict[str, Any] = {"kernel": kernel, "error": error}
        if not self.tiny:
            row["us"] = microseconds(calls)
            if reference is not None:
                row["torch_us"] = microseconds([reference], least=3)
            if n_bytes:
                row["GB/s"] = n_bytes / row["us"] / 1e3
                row["of_copy"] = row["GB/s"] / self.copy_rate
        self.rows.append(row)
        cells = [f"{row.get(key, 0):8.2f}" for key in ("us", "torch_us")]
        rate = f"{row['GB/s']:6.0f} GB/s {row['of_copy']:5.0%}" if "of_copy" in row else ""
        print(f"{kernel:58}{cells[0]} us, torch {cells[1]} us, error {error:.0e} {rate}", flush=True)


def measure_copy() -> float:
    """GB/s, bytes read + written. Not in a graph, whose copies are slower."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return 2 * source.nbytes / statistics.median(times) / 1e6


def reference_router(x: Tensor, weight: Tensor, config: RouterConfig, bias: Tensor | None) -> Any:
    return route(x @ weight.T, config, bias)


def routers(report: Report, models: tuple[Router, ...], tokens: tuple[int, ...]) -> None:
    for model in models:
        config = model.config
        n_copy = copies(4 * config.n_expert * model.hidden, report.tiny)
        weights = [randn(config.n_expert, model.hidden) / model.hidden**0.5 for _ in range(n_copy)]
        bias = randn(config.n_expert) / 10 if model.has_bias else None
        table = torch.arange(config.n_expert, dtype=torch.int32, device=DEVICE)
        for n_token in tokens:
            x = randn(n_token, model.hidden)
            logits = x @ weights[0].T
            routing = route_and_lookup(logits, config, table, bias=bias)
            ids, expected = route(logits, config, bias)
            if not torch.equal(ids, routing.ids.long()):
                raise SystemExit(f"{model.name}: the router differs from the reference")
            error = check(model.name, routing.weights, expected, 1e-6)
            label = f"{model.name}, {config.n_expert} experts, {n_token} token(s)"
            run = partial(route_and_lookup, logits, config, table, bias=bias)
            report.add(f"route            {label}", [run], partial(route, logits, config, bias), error=error)
            calls: list[Call] = [partial(route_and_lookup, x, config, table, weight=w, bias=bias) for w in weights]
            check(model.name, calls[0]().weights, expected, 1e-4)
            report.add(f"product + route  {label}", calls, partial(reference_router, x, weights[0], config, bias))


def norms(report: Report, widths: tuple[int, ...]) -> None:
    for n in widths:
        x, residual, weight = randn(1, n), randn(1, n), randn(n)
        y, _ = rms_norm(x, weight, EPS, residual=residual)
        error = check("rms_norm", y, rms_norm_reference(x + residual, weight, EPS), 1e-6)
        report.add(
            f"rms_norm + residual, {n}",
            [partial(rms_norm, x, weight, EPS, residual=residual)],
            partial(rms_norm_reference, x, weight, EPS),
            error=error,
        )


def rotations(report: Report, capacity: int) -> None:
    cos, sin = randn(capacity, 64), randn(capacity, 64)
    q, k, v, norm = randn(1, 32, 128), randn(1, 4, 128), randn(1, 4, 128), (randn(128), randn(128))
    position = int32(capacity - 1)
    for kind in ("f16", "q8_0"):
        caches: list[Cache] = [
            Q8Cache.zeros(capacity, 4, 128, device=DEVICE) if kind == "q8_0" else randn(capacity, 4, 128).half()
            for _ in range(2)
        ]
        run = partial(qk_norm_rope_append, q, k, v, cos, sin, position, *caches, norms=norm, eps=EPS)

        def reference() -> Tensor:
            rope_reference(rms_norm_reference(k, norm[1], EPS), cos, sin, position[None], False)
            return rope_reference(rms_norm_reference(q, norm[0], EPS), cos, sin, position[None], False)

        report.add(f"q/k norm, rope, append, Qwen3-30B-A3B, {kind}", [run], reference,
                   error=check("rope", run(), reference(), 1e-6))  # fmt: skip
    q_pe, kv, weight, latents = randn(1, 16, 192)[..., 128:], randn(1, 576), randn(512), randn(capacity, 576).half()
    cos, sin = randn(capacity, 32), randn(capacity, 32)
    out = randn(1, 16, 576)[..., 512:]
    run = partial(latent_norm_rope_append, q_pe, kv, weight, cos, sin, position, latents, eps=EPS, out=out)
    error = check("rope", run(), rope_reference(q_pe, cos, sin, position[None], True), 1e-6)
    report.add("latent norm, rope, append, DeepSeek-V2-Lite, f16", [run], error=error)


def caches_of(model: Heads, capacity: int, kind: str) -> Pair:
    def one() -> Cache:
        x = randn(capacity, *([model.n_kv] if model.n_kv else []), model.d)
        return quantize_reference(x) if kind == "q8_0" else x.to(torch.float16 if kind == "f16" else torch.bfloat16)

    return one(), one() if model.n_kv else None


def attend(model: Heads, query: Tensor, caches: Pair, position: Tensor) -> Tensor:
    return decode_attention(query, *caches, position, model.d**-0.5, d_value=model.d_value)


def attentions(report: Report, models: tuple[Heads, ...], contexts: tuple[int, ...], kinds: tuple[str, ...]) -> None:
    for model in models:
        for context in contexts:
            for kind in kinds:
                first = caches_of(model, context, kind)
                n_bytes = sum(p.nbytes for c in first if c is not None for p in (c if isinstance(c, Q8Cache) else (c,)))
                sets = [first] + [caches_of(model, context, kind) for _ in range(copies(n_bytes, report.tiny) - 1)]
                query, position = randn(1, model.n_head, model.d), int32(context - 1)
                k = cached_floats(first[0]).view(context, -1, model.d)
                v = k[..., : model.d_value] if first[1] is None else cached_floats(first[1])
                expected = attention(query, k, v, model.d**-0.5, context - 1)
                q16, k16, v16 = (x.half().transpose(0, 1)[None] for x in (query, k, v))
                sdpa = partial(torch.nn.functional.scaled_dot_product_attention, q16, k16, v16, enable_gqa=True)
                calls: list[Call] = [partial(attend, model, query, c, position) for c in sets]
                error = check(model.name, calls[0](), expected, 2e-3)
                label = f"attention {model.name}, {kind}, context {context}"
                report.add(label, calls, sdpa if kind == "f16" else None, n_bytes, error)


def qwen3_attention_part(report: Report, context: int) -> None:
    """The sum, without the projections: residual add and norm, q/k norm, rope and append, attention."""
    x, residual, weight, qk = randn(1, 2048), randn(1, 2048), randn(2048), (randn(128), randn(128))
    q, k, v = randn(1, 32, 128), randn(1, 4, 128), randn(1, 4, 128)
    cos, sin, position = randn(context, 64), randn(context, 64), int32(context - 1)
    sets = [caches_of(HEADS[0], context, "f16") for _ in range(copies(2048 * context, report.tiny))]

    def part(caches: Pair) -> Tensor:
        assert caches[1] is not None
        rms_norm(x, weight, EPS, residual=residual)
        query = qk_norm_rope_append(q, k, v, cos, sin, position, caches[0], caches[1], norms=qk, eps=EPS)
        return attend(HEADS[0], query, caches, position)

    report.add(f"norm + q/k norm, rope, append + attention, Qwen3, {context}", [partial(part, c) for c in sets])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="check small shapes, without timing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    if not (arguments.tiny or DEVICE.type == "cuda"):
        raise SystemExit("no CUDA device: only --tiny runs here")
    report = Report(arguments.tiny)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if arguments.tiny:
        routers(report, (Router("tiny", 64, RouterConfig(12, 3)),), (2,))
        norms(report, (64,))
        rotations(report, 3)
        attentions(report, TINY_HEADS, (70,), ("f16", "q8_0"))
    else:
        report.copy_rate = measure_copy()
        print(f"{device}, torch {torch.__version__}, copy {report.copy_rate:.0f} GB/s")
        routers(report, ROUTERS, (1, 4, 16))
        norms(report, (2048, 7168))
        rotations(report, 4096)
        attentions(report, HEADS, (512, 4096, 32768), ("f16", "bf16", "q8_0"))
        for context in (512, 4096, 32768):
            qwen3_attention_part(report, context)
    if arguments.json is not None:
        about = {"device": device, "torch": torch.__version__, "copy_GB/s": report.copy_rate}
        arguments.json.write_text(json.dumps(about | {"rows": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
