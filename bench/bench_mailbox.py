"""Times the GPU's side of the mailbox: a layer's routing posted, its answer applied, a step's tokens sent.

What is written is compared with plain torch first. The answers are there already, so nothing is waited for but the bus;
timed again while copies of experts keep that busy. Reference: the same numbers copied by torch, without checks and
sequence numbers; of what has no misses, the experts' ids alone, and the sums of the GPU.
"""

from functools import partial
from typing import NamedTuple

import torch
from gpu_timing import DEVICE, Report, Row, Traffic, check_equal, randn, synchronize
from torch import Tensor

from moe_engine.kernels.mailbox import finish, post, wait
from moe_engine.kernels.router_kernel import Routing
from moe_engine.kernels.worker import HEADER_BYTES, RING, Mailbox

LAYER, N_LAYER, STEP = 1, 4, 6


class Shape(NamedTuple):
    hidden: int
    n_expert: int
    top_k: int


SHAPES = {"Qwen3-30B-A3B": Shape(2048, 128, 8), "DeepSeek-V3": Shape(7168, 256, 8)}


def layers(report: Report, name: str, shape: Shape, tokens: tuple[int, ...]) -> None:
    """A layer with and without misses: only with them `post` sends the input, and `wait` adds the CPU's sums."""
    pinned = DEVICE.type == "cuda"
    beside = Traffic().start if pinned else None
    table = torch.full((N_LAYER, shape.n_expert), -1, dtype=torch.int32, device=DEVICE)
    step, waited = torch.tensor([STEP], device=DEVICE), torch.zeros(N_LAYER, dtype=torch.int64, device=DEVICE)
    for n_token in tokens:
        label, x = f"{name}, {n_token} tokens", randn(n_token, shape.hidden)
        ids = torch.randint(0, shape.n_expert, (n_token, shape.top_k), dtype=torch.int32)
        positions = torch.zeros(n_token, dtype=torch.int32, device=DEVICE)
        out = torch.empty_like(x)
        for kind, first_slot in (("no misses", 3), ("misses", -1)):
            missed = first_slot < 0
            box = Mailbox.allocate(N_LAYER, shape.n_expert, shape.top_k, shape.hidden, n_token, pinned)
            slots = torch.full_like(ids, 3)
            slots[:, 0] = first_slot
            routing = Routing(ids.to(DEVICE), torch.rand(ids.shape).to(DEVICE), slots.to(DEVICE))
            send = partial(post, box, LAYER, step, positions, routing, x)
            send()
            synchronize()
            fields = box.messages[STEP % RING * N_LAYER + LAYER, HEADER_BYTES:].view(torch.int32)
            check_equal(label, fields[: ids.numel()], ids.flatten())
            error = check_equal(label, box.x, x if missed else torch.zeros_like(x))
            sent = x if missed else routing.ids
            host = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=pinned)
            reference = partial(host.copy_, sent, non_blocking=True)
            report.add(f"post, {kind}", "", label, [send], error=error, reference=reference, beside=beside)

            box.y.normal_()
            box.answer_numbers.fill_(4 * (STEP * (N_LAYER + 1) + LAYER) + 1)
            apply = partial(
                wait,
                box,
                LAYER,
                step,
                routing,
                table,
                waited,
                out=out,
                hits=x,
            )
            apply()
            error = check_equal(label, out, x.cpu() + box.y if missed else x)
            reference = partial(added, box.y, x, out) if missed else partial(out.copy_, x)
            report.add(f"wait, {kind}", "", label, [apply], error=error, reference=reference, beside=beside)


def added(y: Tensor, hits: Tensor, out: Tensor) -> Tensor:
    return out.copy_(y, non_blocking=True).add_(hits)


def steps(report: Report, tokens: tuple[int, ...]) -> None:
    for n_token in tokens:
        box = Mailbox.allocate(N_LAYER, 1, 1, 1, n_token, DEVICE.type == "cuda")
        numbers = torch.arange(n_token, dtype=torch.int32, device=DEVICE)
        step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        run = partial(finish, box, step, torch.zeros_like(numbers), numbers, torch.zeros_like(numbers))
        run()
        synchronize()
        found = box.tokens[0, HEADER_BYTES:].view(torch.int32)[:n_token]
        host = torch.empty(n_token, dtype=torch.int32, pin_memory=DEVICE.type == "cuda")
        reference = partial(host.copy_, numbers, non_blocking=True)
        error = check_equal("finish", found, numbers)
        report.add("finish", "", f"{n_token} tokens", [run], error=error, reference=reference)


def results(tiny: bool = False) -> list[Row]:
    report = Report("mailbox")
    shapes, tokens = ({"tiny": Shape(48, 16, 4)}, (2,)) if tiny else (SHAPES, (1, 4, 16))
    for name, shape in shapes.items():
        layers(report, name, shape, tokens)
    steps(report, tokens)
    return report.rows
