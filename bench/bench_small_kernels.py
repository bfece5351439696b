"""Times the small kernels of a decoded token: norm, rotation, router, attention over the cache.

Each is compared with its reference first. The bytes of attention are those of the cache, those of the router's product
its matrix, read once. Reference: the same in torch; for attention SDPA over an f16 cache that is not rotated.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_timing import DEVICE, Call, Report, Row, check, copies, int32, randn
from torch import Tensor

from moe_engine.kernels.attention import attention
from moe_engine.kernels.decode_activations import Activations
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

EPS = 1e-6
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


def reference_router(x: Tensor, weight: Tensor, config: RouterConfig, bias: Tensor | None) -> Any:
    return route(x @ weight.T, config, bias)


def routers(report: Report, models: tuple[Router, ...], tokens: tuple[int, ...]) -> None:
    for model in models:
        config = model.config
        n_bytes = 4 * config.n_expert * model.hidden
        weights = [randn(config.n_expert, model.hidden, seed=i) / model.hidden**0.5 for i in range(copies(n_bytes))]
        bias = randn(config.n_expert) / 10 if model.has_bias else None
        table = torch.arange(config.n_expert, dtype=torch.int32, device=DEVICE)
        for n_token in tokens:
            x = randn(n_token, model.hidden)
            logits = x @ weights[0].T
            run = partial(route_and_lookup, logits, config, table, bias=bias)
            ids, expected = route(logits, config, bias)
            if not torch.equal(ids, run().ids.long()):
                raise SystemExit(f"{model.name}: the router differs from the reference")
            error = check(model.name, run().weights, expected, 1e-6)
            shape = f"{model.name}, {config.n_expert} experts, {n_token} tokens"
            report.add("route", "f32", shape, [run], error=error, reference=partial(route, logits, config, bias))
            calls: list[Call] = [partial(route_and_lookup, x, config, table, weight=w, bias=bias) for w in weights]
            routed = route_and_lookup(x, config, table, weight=weights[0], bias=bias)
            error = check(model.name, routed.weights, expected, 1e-4)
            reference = partial(reference_router, x, weights[0], config, bias)
            report.add("product and route", "f32", shape, calls, error=error, n_bytes=n_bytes, reference=reference)


def norms(report: Report, widths: tuple[int, ...]) -> None:
    for n in widths:
        x, residual, weight = randn(1, n), randn(1, n, seed=1), randn(n, seed=2)
        expected = rms_norm_reference(x + residual, weight, EPS)
        for kernel, activations in (("norm", None), ("norm, 8 bits", Activations.empty(1, n, DEVICE))):
            run = partial(rms_norm, x, weight, EPS, residual=residual, activations=activations)
            reference = partial(rms_norm_reference, x, weight, EPS)
            report.add(kernel, "f32", str(n), [run], error=check(kernel, run()[0], expected, 1e-6), reference=reference)


def rotations(report: Report, capacity: int) -> None:
    cos, sin = randn(capacity, 64), randn(capacity, 64, seed=1)
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

        error = check("rope", run(), reference(), 1e-6)
        report.add("q/k norm, rope, append", kind, "Qwen3-30B-A3B", [run], error=error, reference=reference)
    q_pe, kv, weight, latents = randn(1, 16, 192)[..., 128:], randn(1, 576), randn(512), randn(capacity, 576).half()
    cos, sin = cos[:, :32].contiguous(), sin[:, :32].contiguous()
    out = randn(1, 16, 576)[..., 512:]
    turn = partial(latent_norm_rope_append, q_pe, kv, weight, cos, sin, position, latents, eps=EPS, out=out)
    error = check("rope", turn(), rope_reference(q_pe, cos, sin, position[None], True), 1e-6)
    report.add("latent norm, rope, append", "f16", "DeepSeek-V2-Lite", [turn], error=error)


def caches_of(model: Heads, capacity: int, kind: str) -> Pair:
    def one() -> Cache:
        x = torch.randn(capacity, *([model.n_kv] if model.n_kv else []), model.d, device=DEVICE)
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
                sets = [first] + [caches_of(model, context, kind) for _ in range(copies(n_bytes) - 1)]
                query, position = randn(1, model.n_head, model.d), int32(context - 1)
                k = cached_floats(first[0]).view(context, -1, model.d)
                v = k[..., : model.d_value] if first[1] is None else cached_floats(first[1])
                expected = attention(query, k, v, model.d**-0.5, context - 1)
                q16, k16, v16 = (x.half().transpose(0, 1)[None] for x in (query, k, v))
                sdpa = partial(torch.nn.functional.scaled_dot_product_attention, q16, k16, v16, enable_gqa=True)
                calls: list[Call] = [partial(attend, model, query, c, position) for c in sets]
                error = check(model.name, attend(model, query, first, position), expected, 2e-3)
                shape = f"{model.name}, context {context}"
                reference = sdpa if kind == "f16" and context <= 4096 else None
                report.add("attention", kind, shape, calls, error=error, n_bytes=n_bytes, reference=reference)


def results(tiny: bool = False) -> list[Row]:
    torch.manual_seed(0)
    report = Report("small kernels")
    if tiny:
        routers(report, (Router("tiny", 64, RouterConfig(12, 3)),), (2,))
        norms(report, (64,))
        rotations(report, 3)
        attentions(report, TINY_HEADS, (70,), ("f16", "q8_0"))
    else:
        routers(report, ROUTERS, (1, 4, 16))
        norms(report, (2048, 7168))
        rotations(report, 4096)
        attentions(report, HEADS, (512, 4096, 32768), ("f16", "bf16", "q8_0"))
    return report.rows
