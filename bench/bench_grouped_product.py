"""Times the mixture of experts of a prompt, with fused and with separate dequantization, and with torch's product.

Each method is compared with the plain product first, on a few experts of the same widths. The operations counted are
those of gate, up and down, 6 * n_embd * n_ff for each (token, expert) pair. `fused` and `dequantized` are all of
`moe_prompt`, with sorting and the weighted sum; `sort` the first of its launches. `torch._grouped_mm`, their reference,
is the same with all experts dequantized at once, which takes far more memory, and torch between our sorting and sum.
Its own reference: its products alone with SiLU between them, of rows and bf16 weights that are there already.
"""

from dataclasses import dataclass
from functools import partial

import torch
from gpu_timing import DEVICE, Report, Row, check, check_equal, random_weight
from torch import Tensor

from moe_engine.kernels import grouped_product as gp
from moe_engine.kernels.grouped_expand import dequantize_groups
from moe_engine.kernels.plain_product import plain_prompt
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.kernels.slot_layout import SlotLayout


@dataclass(frozen=True)
class Shape:
    n_embd: int
    n_ff: int
    n_expert: int
    top_k: int


SHAPES = {
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
    "DeepSeek-V2-Lite": Shape(2048, 1408, 64, 6),
    "DeepSeek-V3 (an eighth of its experts)": Shape(7168, 2048, 32, 1),  # with as many rows each
}
METHODS: tuple[gp.Method, ...] = ("fused", "dequantized")


def random_pool(shape: Shape, type: str, n_slot: int) -> tuple[SlotLayout, Tensor]:
    """Slots of equal experts. Down is Q8_0 where its rows cannot be cut into blocks of 256."""
    down = type if shape.n_ff % BY_NAME[type].block_size == 0 else "Q8_0"
    gate, up = (random_weight(type, shape.n_ff, shape.n_embd) for _ in range(2))
    layout, slot = SlotLayout.pack(gate, up, random_weight(down, shape.n_embd, shape.n_ff))
    return layout, slot.repeat(n_slot, 1)


def random_input(shape: Shape, n_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the ids of random experts, weights."""
    generator = torch.Generator().manual_seed(n_token)
    x = torch.randn(n_token, shape.n_embd, generator=generator) / shape.n_embd**0.5
    ids = torch.rand(n_token, shape.n_expert, generator=generator).topk(shape.top_k).indices.int()
    return x.to(torch.bfloat16).to(DEVICE), ids.to(DEVICE), torch.rand(ids.shape, generator=generator).to(DEVICE)


class TorchProduct:
    """`moe_prompt` with `torch._grouped_mm`, for the number of experts that `slots`, int32 `[n_expert]`, has."""

    def __init__(self, layout: SlotLayout, pool: Tensor, slots: Tensor) -> None:
        self.layout, self.pool, self.slots = layout, pool, slots
        new = partial(torch.empty, dtype=torch.bfloat16, device=DEVICE)
        self.gate_up = new(len(slots), 2 * layout.n_ff, layout.hidden)
        self.down = new(len(slots), layout.hidden, layout.n_ff)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        pairs, layout = gp.sort_by_expert(ids, len(self.slots)), self.layout
        groups, gate_up = pairs.groups(self.slots), self.gate_up.flatten(1)
        for part, out in zip((layout.gate, layout.up), gate_up.chunk(2, dim=1), strict=True):
            dequantize_groups(groups, self.pool, part, out)
        dequantize_groups(groups, self.pool, layout.down, self.down.flatten(1))
        y = self.products(x[pairs.token], pairs)
        return gp.weighted_sum(y, ids, pairs.place, weights, self.slots)

    def products(self, rows: Tensor, pairs: gp.Sorted) -> Tensor:
        ends = pairs.offsets[1:]
        gate, up = torch._grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
        return torch._grouped_mm(torch.nn.functional.silu(gate).mul_(up), self.down.transpose(1, 2), offs=ends)


def torch_sort(ids: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their experts, where each expert's begin."""
    experts, order = ids.flatten().sort(stable=True)
    starts = torch.arange(n_expert + 1, dtype=ids.dtype, device=ids.device)
    return order // ids.shape[1], torch.searchsorted(experts, starts)


def errors(shape: Shape, type: str, n_token: int) -> dict[str, float]:
    """Of each method with three experts."""
    few = Shape(shape.n_embd, shape.n_ff, 3, 2)
    (layout, pool), slots = random_pool(few, type, 3), torch.arange(3, dtype=torch.int32, device=DEVICE)
    x, ids, weights = random_input(few, n_token)
    exact = plain_prompt(x, ids, weights, slots, pool, layout).to(DEVICE)
    run = partial(gp.moe_prompt, x, ids, weights, slots, pool, layout)
    found = {method: check(f"{type} {method}", run(method), exact, 1e-2) for method in METHODS}
    return found | {"torch": check(f"{type} torch", TorchProduct(layout, pool, slots)(x, ids, weights), exact, 1e-2)}


def measure(report: Report, name: str, shape: Shape, type: str, tokens: tuple[int, ...]) -> None:
    error = errors(shape, type, 200 if DEVICE.type == "cuda" else 5)
    layout, pool = random_pool(shape, type, shape.n_expert)
    slots = torch.arange(shape.n_expert, dtype=torch.int32, device=DEVICE)
    for n_token in tokens:
        x, ids, weights = random_input(shape, n_token)
        pairs = gp.sort_by_expert(ids, len(slots))
        operations = 6 * shape.n_embd * shape.n_ff * ids.numel()
        label, types = f"{name}, {n_token} tokens", f"{layout.gate.type}/{layout.down.type}"
        by_torch = TorchProduct(layout, pool, slots)
        of_torch = partial(by_torch, x, ids, weights)
        if type == "Q4_K":
            sort, plain_sort = partial(gp.sort_by_expert, ids, len(slots)), partial(torch_sort, ids, len(slots))
            for ours, plain in zip((pairs.token, pairs.offsets), plain_sort(), strict=True):
                check_equal(f"{label}: sort", ours, plain.int())
            report.add("sort", "", label, [sort], error=0.0, reference=plain_sort)
            product = gp.PromptProduct(x, ids, weights, len(slots), layout)

            def of_sorted(product: gp.PromptProduct = product) -> Tensor:
                product.add(pool, product.sorted.groups(slots))
                return product.sum(slots)

            exact = gp.moe_prompt(x, ids, weights, slots, pool, layout)
            assert torch.equal(of_sorted(), exact)
            report.add(
                "prompt experts, sorted before",
                types,
                label,
                [of_sorted],
                error=0.0,
                operations=operations,
                reference=of_torch,
            )
        for method in METHODS:
            report.add(
                f"prompt experts, {method}",
                types,
                label,
                [partial(gp.moe_prompt, x, ids, weights, slots, pool, layout, method)],
                error=error[method],
                operations=operations,
                reference=of_torch,
            )
        report.add(
            "prompt experts, torch._grouped_mm",
            types,
            label,
            [of_torch],
            error=error["torch"],
            operations=operations,
            reference=partial(by_torch.products, x[pairs.token], pairs),
        )


def results(tiny: bool = False) -> list[Row]:
    report = Report("grouped product")
    if tiny:
        measure(report, "tiny", Shape(256, 256, 3, 2), "Q4_K", (5,))
        return report.rows
    for name, shape in SHAPES.items():
        for type in ("Q4_K", "Q6_K", "Q8_0"):
            measure(report, name, shape, type, (16, 64, 256, 2048, 8192, 16384) if type == "Q4_K" else (64, 2048, 8192))
    return report.rows
