"""Times the decode product of a layer's routed experts: gate, up, SiLU, down, weighted sum.

Each is compared with f64 first. The experts of a call rotate through a pool far larger than the cache. The bytes of a
row are those of each distinct expert once. Reference: torch's products of bf16 weights that are there already, token by
token and expert by expert.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gpu_timing import DEVICE, Report, Row, check, exact_values, randn, random_weight
from torch import Tensor

from moe_engine.kernels import decode_tiles
from moe_engine.kernels.decode_product import MoeBuffers, moe_decode
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.kernels.slot_layout import SlotLayout

# hidden, n_ff, top_k, experts of a layer
EXPERTS = {
    "Qwen3-30B-A3B": (2048, 768, 8, 128),
    "DeepSeek-V2-Lite": (2048, 1408, 6, 64),
    "DeepSeek-V3": (7168, 2048, 8, 256),
}
TINY_EXPERTS = {"tiny": (256, 256, 2, 4)}
# Gate and up, down; Q8_0 where rows of n_ff cannot be cut into blocks of 256
TYPES = ("Q4_K/Q4_K", "Q4_K/Q6_K", "Q5_K/Q5_K", "Q6_K/Q6_K", "Q8_0/Q8_0", "MXFP4/MXFP4", "IQ4_XS/IQ4_XS", "Q2_K/Q3_K")
FEW_TYPES = ("Q4_K/Q4_K", "Q4_K/Q6_K")
ROTATION = 16  # products a graph, each with other experts
POOL_BYTES = 2 << 30

Forms = Mapping[str, Mapping[str, Any]]
"""For each name what takes the place of things in decode_tiles.py."""


@contextmanager
def replaced(form: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(decode_tiles, name) for name in form}
    try:
        for name, value in form.items():
            setattr(decode_tiles, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(decode_tiles, name, value)


def torch_experts(x: Tensor, weights: tuple[Tensor, Tensor, Tensor], share: Tensor) -> Callable[[], Tensor]:
    """The same, with experts that are copies of one."""
    x, share = x.to(torch.bfloat16), share.to(torch.bfloat16)
    n_token, top_k = share.shape
    gate, up, down = (weight.to(torch.bfloat16).repeat(top_k, 1, 1) for weight in weights)

    def run() -> Tensor:
        out = torch.zeros(n_token, 1, down.shape[1], dtype=torch.bfloat16, device=x.device)
        for t in range(n_token):
            for e in range(top_k):
                h = torch.nn.functional.silu(x[t : t + 1] @ gate[e].T).mul_(x[t : t + 1] @ up[e].T)
                out[t].addcmul_(h @ down[e].T, share[t, e])
        return out[:, 0]

    return run


def experts(report: Report, name: str, types: str, tokens: tuple[int, ...], forms: Forms | None = None) -> None:
    hidden, n_ff, top_k, n_expert = (EXPERTS | TINY_EXPERTS)[name]
    gate, down = types.split("/")
    if n_ff % BY_NAME[down].block_size:
        down = "Q8_0"
    weights = random_weight(gate, n_ff, hidden), random_weight(gate, n_ff, hidden), random_weight(down, hidden, n_ff)
    layout, slot = SlotLayout.pack(*weights)
    n_slot = n_expert if DEVICE.type == "cpu" else max(n_expert // 4, min(4 * n_expert, POOL_BYTES // slot.numel()))
    pool = slot.repeat(n_slot, 1)
    w_gate, w_up, w_down = (exact_values(weight) for weight in weights)
    for n_token in tokens:
        generator = torch.Generator().manual_seed(n_token)
        x = randn(n_token, hidden) / float(w_gate[:16].square().sum(dim=1).mean().sqrt())
        share = torch.rand(n_token, top_k, generator=generator).to(DEVICE)
        chosen = []
        for call in range(ROTATION):
            ids = torch.rand(n_token, n_expert, generator=generator).topk(top_k).indices
            chosen.append(((ids + call * n_expert) % n_slot).int().to(DEVICE))
        out, buffers = torch.empty_like(x), MoeBuffers.empty(layout, n_token, top_k, DEVICE)
        run = partial(moe_decode, x, pool, layout, weights=share, out=out, buffers=buffers)
        h = torch.nn.functional.silu(x.double() @ w_gate.T) * (x.double() @ w_up.T)
        exact = h @ w_down.T * share.sum(dim=1, keepdim=True)
        reference = torch_experts(x, (w_gate, w_up, w_down), share)
        check(f"{name} {types} torch", reference(), exact, 2e-2)
        for form, tiles in (forms or {"": {}}).items():
            with replaced(tiles):
                report.add(
                    "routed experts",
                    f"{gate}/{down}",
                    f"{name}, {n_token} tokens{form}",
                    [partial(run, slots=slots) for slots in chosen],
                    error=check(f"{name} {types}", run(slots=chosen[0]), exact, 1.5e-2),
                    n_bytes=sum(len(slots.unique()) for slots in chosen) / ROTATION * layout.slot_bytes,
                    reference=reference,
                )


def results(tiny: bool = False) -> list[Row]:
    report = Report("decode product")
    if tiny:
        experts(report, "tiny", "Q4_K/Q6_K", (1, 3))
        return report.rows
    for name in EXPERTS:
        for types in TYPES if name != "DeepSeek-V2-Lite" else FEW_TYPES[:1]:
            experts(report, name, types, (1, 2, 4, 8, 16) if types in FEW_TYPES else (1,))
    return report.rows
