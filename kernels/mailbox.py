"""The GPU's side of the mailbox (`worker.py`): posts a layer's misses, waits for the answer, sends the tokens.

All launches have fixed grids and read the step's number from the device, so a CUDA graph can hold them. A layer in
which nothing is missed is posted too (for statistics and the policy), but not waited for.
"""

import torch
from torch import Tensor

from moe_engine.kernels.decode_overlap import overlap_options
from moe_engine.kernels.device import cdiv, next_power_of_2
from moe_engine.kernels.mailbox_kernel import finish_kernel, post_kernel, wait_kernel
from moe_engine.kernels.router_kernel import Routing
from moe_engine.kernels.worker import HEADER_BYTES, MAX_AHEAD, RING, X_BLOCK, Y_BLOCK, Mailbox

WAIT_NANOSECONDS = 4_000_000_000
_WAIT_LOOKS = 2000  # in Triton's interpreter, which has no clock; a look takes it about 2 ms


def new_stamps(mailbox: Mailbox, device: torch.device) -> Tensor:
    """int64 `[3 * n_layer + 2]`, in nanoseconds of the GPU's clock, for `post`, `wait` and `finish` to fill in.

    Of each layer: its misses are posted, the wait begins, the wait is over. Then: the step before this has ended, this
    step has ended.
    """
    return torch.zeros(3 * mailbox.n_layer + 2, dtype=torch.int64, device=device)


def post(
    mailbox: Mailbox,
    layer: int,
    step: Tensor,
    positions: Tensor,
    routing: Routing,
    x: Tensor,
    *,
    replay_ahead: Tensor | None = None,
    stamps: Tensor | None = None,
) -> None:
    """Sends a layer's routing to the host, with what it guesses of the next layer's, and its input where something is
    missed.

    step: int64 `[1]`. positions: int32 `[n_token]`; tokens below zero are taken out of `routing` (-1). x: f32
    `[n_token, hidden]`. replay_ahead: int32 `[MAX_AHEAD, n_step, n_layer,
    top_k]`, by how many layers before: recorded guesses of each layer in the place of those in `routing`. stamps: see
    `new_stamps`.
    """
    n_token, top_k = routing.ids.shape
    assert x.shape == (n_token, mailbox.hidden), (x.shape, mailbox.hidden)
    assert n_token <= mailbox.max_batch, (n_token, mailbox.max_batch)
    assert top_k == mailbox.top_k, (top_k, mailbox.top_k)
    assert x.is_contiguous()
    n_ahead = 0 if routing.ahead is None else len(routing.ahead)
    assert layer + n_ahead < mailbox.n_layer
    ahead, n_replay = routing.ahead, 1
    if replay_ahead is not None:
        n_replay = replay_ahead.shape[1]
        assert replay_ahead.shape == (MAX_AHEAD, n_replay, mailbox.n_layer, top_k), replay_ahead.shape
        ahead = replay_ahead
    assert ahead is None or ahead.is_contiguous()
    block = min(X_BLOCK, next_power_of_2(x.numel()))
    post_kernel[cdiv(x.numel(), block),](
        mailbox.messages.view(-1).view(step.dtype),
        mailbox.messages.view(-1).view(routing.ids.dtype),
        mailbox.messages.view(-1).view(x.dtype),
        mailbox.x,
        mailbox.x_checks,
        step,
        positions,
        *(routing.ids, routing.weights, routing.slots),
        x,
        routing.ids if ahead is None else ahead,
        n_replay,
        step if stamps is None else stamps,
        layer,
        REPLAY=replay_ahead is not None,
        AHEAD=n_ahead,
        AHEAD_BYTES=4 * mailbox.max_batch * top_k,
        TIMED=stamps is not None,
        N_LAYER=mailbox.n_layer,
        RING=RING,
        MESSAGE_BYTES=mailbox.message_bytes,
        IDS_AT=mailbox.ids_offset,
        WEIGHTS_AT=mailbox.weights_offset,
        SLOTS_AT=mailbox.slots_offset,
        AHEAD_AT=mailbox.ahead_offset,
        N_TOKEN=n_token,
        TOP_K=top_k,
        PAIRS=next_power_of_2(n_token * top_k),
        N_X=x.numel(),
        BLOCK=block,
        ON_GPU=x.is_cuda,
        num_warps=16,
        **overlap_options(x.device),
    )


def wait(
    mailbox: Mailbox,
    layer: int,
    step: Tensor,
    routing: Routing,
    slot_table: Tensor,
    waited: Tensor,
    *,
    out: Tensor | None = None,
    hits: Tensor | None = None,
    late: Tensor | None = None,
    stamps: Tensor | None = None,
    time_out: int | None = None,
) -> None:
    """Waits for the answer to what `post` has sent, if something was missed, and applies it.

    With `out` (f32 `[n_token, hidden]`): out = hits + what the CPU computed, and `late` (int32 `[n_token,
    top_k]`) receives the slots of experts fetched meanwhile, -1 for the others. Without `out` those slots replace
    the -1 in `routing.slots`. Evicted experts are taken out of slot_table, int32 `[n_layer, n_expert]`. waited: int64
    `[n_layer]`, to which the nanoseconds are added.
    After `time_out` (nanoseconds, or looks where there is no GPU) the mailbox's error is set, and neither this nor any
    later call waits.
    """
    n_token, top_k = routing.ids.shape
    merge = out is None
    n_x = 0 if out is None else out.numel()
    assert merge or n_x == n_token * mailbox.hidden, (n_x, n_token)
    for part in (out, hits):
        assert part is None or part.is_contiguous()
    block = 1 if merge else min(Y_BLOCK, next_power_of_2(n_x))
    stand_in = mailbox.y  # never read
    if time_out is None:
        time_out = WAIT_NANOSECONDS if routing.ids.is_cuda else _WAIT_LOOKS
    wait_kernel[max(1, cdiv(n_x, block)),](
        mailbox.answer_numbers,
        mailbox.answer.view(step.dtype),
        mailbox.answer.view(routing.ids.dtype),
        mailbox.control,
        mailbox.y,
        step,
        routing.ids,
        routing.slots,
        routing.slots if late is None else late,
        slot_table,
        stand_in if hits is None else hits,
        stand_in if out is None else out,
        waited,
        step if stamps is None else stamps,
        layer,
        time_out,
        TIMED=stamps is not None,
        N_LAYER=mailbox.n_layer,
        LATE_AT=mailbox.late_offset,
        EVICTED_AT=mailbox.evicted_offset,
        N_TOKEN=n_token,
        TOP_K=top_k,
        PAIRS=next_power_of_2(n_token * top_k),
        N_X=n_x,
        BLOCK=block,
        HAS_HITS=hits is not None,
        LATE=late is not None,
        MERGE=merge,
        ON_GPU=routing.ids.is_cuda,
        num_warps=1,  # each warp looks on its own: with 8, beside copies, a look takes up to 80 us, with 1 a few
        **overlap_options(routing.ids.device),
    )


def finish(
    mailbox: Mailbox, step: Tensor, positions: Tensor, tokens: Tensor, bad: Tensor, *, stamps: Tensor | None = None
) -> None:
    """Sends a step's tokens (int32 `[n_token]`) to the host; step and positions go up by one.

    bad: int32 `[n_token]`, not zero where logits were not finite. Positions below zero stay.
    """
    n_token = tokens.numel()
    assert HEADER_BYTES == 64
    finish_kernel[1,](
        mailbox.tokens.view(-1).view(step.dtype),
        mailbox.tokens.view(-1).view(tokens.dtype),
        step,
        positions,
        tokens,
        bad,
        step if stamps is None else stamps,
        TIMED=stamps is not None,
        N_LAYER=mailbox.n_layer,
        RING=RING,
        TOKEN_BYTES=mailbox.token_bytes,
        N_TOKEN=n_token,
        TOKENS=next_power_of_2(n_token),
        ON_GPU=tokens.is_cuda,
        num_warps=1,
        **overlap_options(tokens.device),
    )
