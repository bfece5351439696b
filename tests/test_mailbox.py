"""The GPU's side of the mailbox, in Triton's interpreter or on a GPU, with the host's side played by the test."""

from typing import Any

import pytest
import torch
from fake_gpu import check
from torch import Tensor

from moe_engine.kernels.mailbox import finish, post, wait
from moe_engine.kernels.router_kernel import Routing
from moe_engine.kernels.worker import HEADER_BYTES, RING, X_BLOCK, Mailbox

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_LAYER, N_EXPERT, TOP_K, MAX_BATCH = 3, 16, 4, 3


def mailbox(hidden: int) -> Mailbox:
    return Mailbox.allocate(N_LAYER, N_EXPERT, TOP_K, hidden, MAX_BATCH, pinned=DEVICE.type == "cuda")


def on_device(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def part(region: Tensor, offset: int, n: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """n numbers of 4 bytes at an offset (a view)."""
    return region[offset : offset + 4 * n].view(dtype)


def header(region: Tensor) -> Tensor:
    return region[:HEADER_BYTES].view(torch.int64)


def posted(
    hidden: int,
    slots: list[list[int]],
    positions: list[int],
    ahead: Tensor | None = None,
    layer: int = 1,
    **options: Tensor,
) -> tuple[Mailbox, Routing, Tensor]:
    """Posts a layer of step 6."""
    box = mailbox(hidden)
    n_token = len(slots)
    ids = on_device([[(5 * t + 3 * k) % N_EXPERT for k in range(TOP_K)] for t in range(n_token)])
    routing = Routing(ids, torch.rand(n_token, TOP_K, device=DEVICE), on_device(slots), ahead)
    x = torch.randn(n_token, hidden, device=DEVICE)
    step = on_device([6], torch.int64)
    post(box, layer, step, on_device(positions), routing, x, **options)
    sync()
    return box, routing, x


@pytest.mark.parametrize("hidden", [48, 2560, 12000])  # one program and several
def test_a_layer_with_misses_is_posted_whole(hidden: int) -> None:
    slots = [[0, -1, 2, 3], [7, 7, 7, 7], [-1, -1, 4, 5]]
    box, routing, x = posted(hidden, slots, [3, 0, 9])
    record = box.messages[6 % RING * N_LAYER + 1]
    assert header(record)[:3].tolist() == [6 * (N_LAYER + 1) + 1, 3, 3]
    n = 3 * TOP_K
    assert part(record, box.ids_offset, n).tolist() == routing.ids.flatten().tolist()
    assert part(record, box.slots_offset, n).tolist() == [s for row in slots for s in row]
    assert torch.equal(part(record, box.weights_offset, n, torch.float32), routing.weights.flatten().cpu())
    assert torch.equal(box.x, x.cpu())
    sent = [part(record, at, n) for at in (box.ids_offset, box.slots_offset, box.weights_offset)]
    assert int(header(record)[4]) == check(25, *(field.numpy() for field in (*sent, header(record)[1:4].int())))
    sums = [check(25, block.numpy()) for block in box.x.flatten().split(X_BLOCK)]
    assert box.x_checks[: len(sums), 0].tolist() == sums
    others = [r for r in range(RING * N_LAYER) if r != 6 % RING * N_LAYER + 1]
    assert not box.messages[others].any()


def test_without_misses_the_input_stays() -> None:
    box, _, _ = posted(48, [[0, 1, 2, 3]], [5])
    assert header(box.messages[6 % RING * N_LAYER + 1])[:3].tolist() == [25, 1, 0]
    assert not box.x.any()


def test_tokens_of_ended_sequences_choose_nothing() -> None:
    box, routing, _ = posted(48, [[0, 1, 2, 3], [-1, -1, -1, -1]], [5, -1])
    record = box.messages[6 % RING * N_LAYER + 1]
    assert int(header(record)[2]) == 0
    assert part(record, box.ids_offset, 8).tolist()[TOP_K:] == [-1] * TOP_K
    assert routing.ids[1].tolist() == routing.slots[1].tolist() == [-1] * TOP_K


def test_what_the_next_layers_will_choose_is_posted_too() -> None:
    ahead = on_device([[[3, 1, 2, 0], [4, 5, 6, 7], [15, 8, 9, 10]]])
    slots = [[0, 1, 2, 3]] * 3
    box, routing, _ = posted(48, slots, [5, -1, 8], ahead)
    record = box.messages[6 % RING * N_LAYER + 1]
    assert header(record)[:4].tolist() == [25, 3, 0, 1]
    assert part(record, box.ahead_offset, 12).tolist() == [3, 1, 2, 0, -1, -1, -1, -1, 15, 8, 9, 10]
    assert part(record, box.slots_offset, 4).tolist() == routing.slots[0].tolist() == [0, 1, 2, 3]

    twice = torch.cat([ahead, ahead.flip(1)])[:, :2].contiguous()
    box, _, _ = posted(48, slots[:2], [5, 6], twice, layer=0)
    record = box.messages[6 % RING * N_LAYER]
    assert header(record)[:4].tolist() == [24, 2, 0, 2]
    for i in range(2):
        found = part(record, box.ahead_offset + 4 * i * MAX_BATCH * TOP_K, 8)
        assert found.tolist() == twice[i].flatten().tolist()


@pytest.mark.parametrize("layer", [0, 1])
def test_recorded_predictions_take_the_routers_place(layer: int) -> None:
    guesses = torch.randint(0, N_EXPERT, (2, 5, N_LAYER, TOP_K), dtype=torch.int32, device=DEVICE)
    n_ahead, slots = 2 - layer, [[0, 1, 2, 3]] * 3
    ahead = torch.zeros(n_ahead, 3, TOP_K, dtype=torch.int32, device=DEVICE)
    box, _, _ = posted(48, slots, [5, 6, 7], ahead, layer=layer, replay_ahead=guesses)
    record = box.messages[6 % RING * N_LAYER + layer]
    assert int(header(record)[3]) == n_ahead
    for i in range(n_ahead):
        expected = torch.cat([guesses[i, (6 + 97 * token) % 5, layer + 1 + i] for token in range(3)])
        found = part(record, box.ahead_offset + 4 * i * MAX_BATCH * TOP_K, 12)
        assert found.tolist() == expected.tolist()


def answer(box: Mailbox, seq: int, flags: int, late: list[int], evicted: list[int]) -> None:
    part(box.answer, box.late_offset, len(late)).copy_(torch.tensor(late, dtype=torch.int32))
    part(box.answer, box.evicted_offset, len(evicted)).copy_(torch.tensor(evicted, dtype=torch.int32))
    header(box.answer)[0] = len(evicted)
    box.answer_numbers[:, 0] = 4 * seq + flags


def receive(box: Mailbox, routing: Routing, table: Tensor, **options: Any) -> None:
    """Waits for the answer to layer 1 of step 6, whose number is 25."""
    wait(box, 1, on_device([6], torch.int64), routing, table, on_device([0] * N_LAYER, torch.int64), **options)
    sync()


@pytest.mark.parametrize("hidden", [48, 5000])
@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_an_answer_is_applied(hidden: int, flags: int) -> None:
    box, routing, x = posted(hidden, [[0, -1, 2, 3], [-1, 1, 1, 1]], [3, 4])
    box.y.normal_()
    answer(box, 25, flags, [-1, 9, -1, -1, 5, -1, -1, -1], [7, 40])
    table = torch.zeros(N_LAYER, N_EXPERT, dtype=torch.int32, device=DEVICE)
    out, late = torch.empty_like(x), torch.empty_like(routing.slots)
    receive(box, routing, table, out=out, hits=x, late=late)
    expected = x.cpu() + (box.y[:2] if flags & 1 else 0)
    assert torch.equal(out.cpu(), expected)
    assert late.tolist() == ([[-1, 9, -1, -1], [5, -1, -1, -1]] if flags & 2 else [[-1] * 4] * 2)
    assert (table.cpu() < 0).flatten().nonzero().flatten().tolist() == [7, 40]
    assert routing.slots.tolist() == [[0, -1, 2, 3], [-1, 1, 1, 1]]


def test_fetched_experts_can_join_the_hits() -> None:
    box, routing, _ = posted(48, [[0, -1, 2, 3], [-1, 1, 1, 1]], [3, 4])
    answer(box, 25, 2, [-1, 9, -1, -1, 5, -1, -1, -1], [])
    table = torch.zeros(N_LAYER, N_EXPERT, dtype=torch.int32, device=DEVICE)
    receive(box, routing, table)
    assert routing.slots.tolist() == [[0, 9, 2, 3], [5, 1, 1, 1]]
    assert not table.any()


def test_without_misses_nothing_is_waited_for() -> None:
    box, routing, x = posted(48, [[0, 1, 2, 3]], [3])
    out = torch.empty_like(x)
    table = torch.zeros(N_LAYER, N_EXPERT, dtype=torch.int32, device=DEVICE)
    receive(box, routing, table, out=out, hits=x)
    assert torch.equal(out, x)
    assert not box.control.any()


@pytest.mark.parametrize("hidden", [48, 5000])
@pytest.mark.parametrize("aborted", [False, True])
def test_an_answer_that_never_comes_ends_the_wait(aborted: bool, hidden: int) -> None:
    box, routing, x = posted(hidden, [[0, -1, 2, 3]], [3])
    answer(box, 24, 1, [-1] * 4, [3])  # the one of the layer before
    box.control[0] = int(aborted)
    table = torch.zeros(N_LAYER, N_EXPERT, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(x)
    time_out = 20_000_000 if DEVICE.type == "cuda" else 20
    receive(box, routing, table, out=out, hits=x, time_out=time_out)
    assert torch.equal(out, x)  # an answer to something else is not taken
    assert not table.any()
    assert int(box.control[1]) == int(not aborted)


def test_tokens_are_sent_and_positions_move_on() -> None:
    box = mailbox(48)
    step, positions, tokens = on_device([7], torch.int64), on_device([4, -1, 0]), on_device([11, 12, 13])
    finish(box, step, positions, tokens, on_device([0, 1, 0]))
    sync()
    record = box.tokens[7 % RING]
    assert header(record)[:3].tolist() == [7 * (N_LAYER + 1) + N_LAYER, 3, 0]  # an ended sequence is never bad
    assert part(record, HEADER_BYTES, 3).tolist() == [11, 12, 13]
    assert (step.tolist(), positions.tolist()) == ([8], [5, -1, 1])
    finish(box, step, positions, tokens, on_device([0, 0, 1]))
    sync()
    assert int(header(box.tokens[8 % RING])[2]) == 1
