"""Times attention of one token over the cache, whose bytes count.

Each is compared with its reference first. Reference time: SDPA of torch over an f16 cache that is not rotated.
"""

from functools import partial
from typing import NamedTuple

import torch
from gpu_timing import DEVICE, Call, Report, Row, check, copies, int32, randn
from torch import Tensor

from moe_engine.kernels.attention import attention
from moe_engine.kernels.decode_attention import decode_attention
from moe_engine.kernels.norm_rope import Cache, Q8Cache, cached_floats, quantize_reference

Pair = tuple[Cache, Cache | None]  # without values: latent


class Heads(NamedTuple):
    name: str
    n_head: int
    n_kv: int  # 0: latent
    d: int
    d_value: int


HEADS = (
    Heads("Qwen3-30B-A3B", 32, 4, 128, 128),
    Heads("DeepSeek-V2-Lite", 16, 0, 576, 512),
    Heads("DeepSeek-V3", 128, 0, 576, 512),
)
TINY_HEADS = (Heads("tiny", 4, 2, 64, 64), Heads("tiny MLA", 4, 0, 96, 64))


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
                report.add("attention", kind, shape, calls, error=error, n_bytes=n_bytes, reference=sdpa)


def results(tiny: bool = False) -> list[Row]:
    torch.manual_seed(0)
    report = Report("attention")
    if tiny:
        attentions(report, TINY_HEADS, (70,), ("f16", "q8_0"))
    else:
        attentions(report, HEADS, (512, 4096, 32768), ("f16", "bf16", "q8_0"))
    return report.rows
