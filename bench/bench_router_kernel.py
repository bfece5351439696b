"""Times the router: the choice from logits, and with the product before it, whose bytes are its matrix, read once.

Each is compared with its reference first, the same in torch.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_timing import DEVICE, Call, Report, Row, check, copies, randn
from torch import Tensor

from moe_engine.kernels.router import RouterConfig, route
from moe_engine.kernels.router_kernel import route_and_lookup


class Router(NamedTuple):
    name: str
    hidden: int
    config: RouterConfig
    has_bias: bool = False


ROUTERS = (
    Router("Qwen3-30B-A3B", 2048, RouterConfig(128, 8, "softmax", True)),
    Router("DeepSeek-V2-Lite", 2048, RouterConfig(64, 6)),
    Router("DeepSeek-V3", 7168, RouterConfig(256, 8, "sigmoid", True, 2.5, 8, 4, "top2_sum"), True),
)


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


def results(tiny: bool = False) -> list[Row]:
    torch.manual_seed(0)
    report = Report("router")
    if tiny:
        routers(report, (Router("tiny", 64, RouterConfig(12, 3)),), (2,))
    else:
        routers(report, ROUTERS, (1, 4, 16))
    return report.rows
