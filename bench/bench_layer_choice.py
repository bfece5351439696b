"""Times how the host learns a layer's routing: one kernel that writes it into page-locked memory.

Each is compared with plain torch first. Reference: the same numbers counted with torch and copied to the host. Both
without the host's wait.
"""

from functools import partial

import torch
from gpu_timing import DEVICE, Report, Row, check_equal, synchronize
from torch import Tensor

from moe_engine.kernels.layer_choice import ChoiceOnHost
from moe_engine.prompt_experts import FORECAST_TOKENS
from moe_engine.prompt_split import SHORT_PROMPT


def counted(
    offsets: Tensor, tables: Tensor, foreseen: Tensor, numbers: Tensor, copied: tuple[tuple[Tensor, Tensor], ...]
) -> Tensor:
    """Into `numbers`, int32 `[4, n_expert]`, on the host. copied: pairs of target, on the host, and source."""
    for target, source in copied:
        target.copy_(source, non_blocking=True)
    of_next = torch.zeros_like(offsets[1:])
    of_next.index_add_(0, foreseen.flatten(), torch.ones_like(foreseen.flatten()))
    return numbers.copy_(torch.stack([offsets.diff(), *tables, of_next]), non_blocking=True)


def choices(report: Report, name: str, n_expert: int, top_k: int, hidden: int, tokens: tuple[int, ...]) -> None:
    for n_token in tokens:
        generator = torch.Generator().manual_seed(n_token)
        ids, foreseen = torch.randint(0, n_expert, (2, n_token, top_k), generator=generator, dtype=torch.int32)
        foreseen = foreseen[:FORECAST_TOKENS]
        tables = torch.randint(-1, 50, (2, n_expert), generator=generator, dtype=torch.int32)
        counts, of_next = (torch.bincount(chosen.flatten(), minlength=n_expert) for chosen in (ids, foreseen))
        expected = torch.stack([counts, *tables, of_next]).int()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        x, weights = torch.randn(n_token, hidden, generator=generator), torch.rand(ids.shape, generator=generator)
        at, slots, following, *inputs = (part.to(DEVICE) for part in (offsets, tables, foreseen, x, ids, weights))
        host = ChoiceOnHost(n_expert, n_token, hidden, top_k, DEVICE)
        numbers = torch.empty(4, n_expert, dtype=torch.int32, pin_memory=DEVICE.type == "cuda")
        label, brought = f"{name}, {n_token} tokens", (inputs[0], inputs[1], inputs[2])
        landing = [torch.empty(part.shape, dtype=part.dtype, pin_memory=numbers.is_pinned()) for part in brought]
        for kernel, some in (("choice", None), ("choice and inputs", brought)):
            if some is not None and n_token > SHORT_PROMPT:
                continue
            run = partial(host._launch, at, slots, following, some)
            run()
            synchronize()
            error = check_equal(label, host._numbers, expected)
            if some is not None:
                check_equal(label, host.x, x)
            copied = () if some is None else tuple(zip(landing, some, strict=True))
            reference = partial(counted, at, slots, following, numbers, copied)
            report.add(kernel, "", label, [run], error=error, reference=reference)


def results(tiny: bool = False) -> list[Row]:
    report = Report("layer choice")
    if tiny:
        choices(report, "tiny", 10, 3, 64, (5,))
    else:
        choices(report, "Qwen3-30B-A3B", 128, 8, 2048, (32, 256, 8192))
    return report.rows
