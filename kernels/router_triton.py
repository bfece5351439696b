"""The Triton kernels that `router_kernel` launches: the router's product, and the choice of experts."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_overlap import let_next_kernel_start, wait_for_previous_kernel
from moe_engine.kernels.launch import launched

_SMALLEST_SUM = tl.constexpr(6.103515625e-05)  # router.route clamps the sum of weights to it
_TAKEN = tl.constexpr(-(1 << 31))  # below the order of any score, minus infinity included


@triton.jit
def _order(score):
    """An int32 that orders as the score does. As for torch.sort, -0 equals +0 and NaN is greatest."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 without losing small x: 2 artanh(x / (2 + x)), whose series is good to 1e-8 below 1/2."""
    s = x / (2.0 + x)
    t = s * s
    series = s * (2.0 + t * (2 / 3 + t * (2 / 5 + t * (2 / 7 + t * (2 / 9 + t * (2 / 11))))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def _gate(logit, largest, total, GATING: tl.constexpr):
    """Scores from logits; `largest` and `total` (the sum of exponentials) are softmax's."""
    if GATING == "softmax":
        return tl.div_rn(tl.exp(logit - largest), total)
    elif GATING == "sigmoid":
        return tl.div_rn(1.0, 1.0 + tl.exp(-logit))
    elif GATING == "sqrt_softplus":
        return tl.sqrt_rn(tl.where(logit > 20.0, logit, _log1p(tl.exp(tl.minimum(logit, 20.0)))))
    else:
        tl.static_assert(GATING == "softmax_selected")
        return logit


@triton.jit
def _pick(index, first, second, third):
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


@triton.jit
def _limit_groups(order, N_GROUP: tl.constexpr, N_USED: tl.constexpr, GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """Which groups (rows of `order`, whose unreal members are _TAKEN) are kept: bool `[GROUPS, 1]`."""
    best = tl.max(order, 1)
    if TOP2:
        member = tl.broadcast_to(tl.arange(0, order.shape[1])[None, :], order.shape)
        winner = tl.min(tl.where(order == best[:, None], member, order.shape[1]), 1)
        second = tl.max(tl.where(member == winner[:, None], _TAKEN, order), 1)
        best = _order(_score_of(best) + _score_of(second))
    # A group's rank is the number of groups before it; all pairs at once take less time than repeated maxima
    group = tl.arange(0, GROUPS)
    best = tl.where(group < N_GROUP, best, _TAKEN)
    mine, other = best[:, None], best[None, :]
    before = (other > mine) | ((other == mine) & (group[None, :] < group[:, None]))
    return (tl.sum(before.to(tl.int32), 1) < N_USED)[:, None]


@launched
@triton.jit
def choose_kernel(
    logits,
    bias,
    next_bias,
    second_bias,
    slot_table,
    ids,
    weights,
    slots,
    next_ids,
    scale,
    replay,
    step,
    n_replay,
    layer,
    REPLAY: tl.constexpr,
    N_LAYER: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    N_EXPERT: tl.constexpr,
    TOP_K: tl.constexpr,
    K_LANES: tl.constexpr,
    GATING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    N_GROUP: tl.constexpr,
    N_USED: tl.constexpr,
    TOP2: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (t, 0) routes token t. Its tile is [group, member]; one group of all experts if there are no limits.

    AHEAD: how many of the next layers, whose logits follow those of this layer, program (t, 1 + i) chooses for.
    REPLAY: the weights are still the router's, the experts those of `replay`, `[n_replay, N_LAYER, TOP_K]`.
    """
    group_size: tl.constexpr = N_EXPERT // N_GROUP
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, MEMBERS)[None, :]
    expert = group * group_size + member
    real = (group < N_GROUP) & (member < group_size)
    ahead = tl.program_id(1)
    if HAS_BIAS:
        added = tl.load(_pick(ahead, bias, next_bias, second_bias) + expert, mask=real, other=0.0)
    zero = wait_for_previous_kernel(OVERLAP)
    token = tl.program_id(0) + zero
    let_next_kernel_start(OVERLAP)
    k = tl.arange(0, K_LANES)
    is_choice = k < TOP_K
    if REPLAY:
        source = (tl.load(step + zero) + token * 97) % n_replay * N_LAYER + layer
        recorded = tl.load(replay + source * TOP_K + k, mask=is_choice, other=0)
    row = logits + (token * (1 + AHEAD) + ahead) * N_EXPERT
    logit = tl.load(row + expert, mask=real, other=float("-inf"))
    largest = tl.max(tl.max(logit, 1), 0)
    total = tl.sum(tl.sum(tl.exp(logit - largest), 1), 0)
    selection = _gate(logit, largest, total, GATING)
    if HAS_BIAS:
        selection += added
    order = tl.where(real, _order(selection), _TAKEN)
    if N_GROUP > 1:
        keep = _limit_groups(order, N_GROUP, N_USED, GROUPS, TOP2)
        order = tl.where(keep | (real == 0), order, _order(tl.full([1, 1], float("-inf"), tl.float32)))

    # In one dimension a maximum of 32-bit integers is one instruction for a warp
    order = tl.reshape(order, [GROUPS * MEMBERS])
    flat = tl.arange(0, GROUPS * MEMBERS)
    expert_of = (flat // MEMBERS) * group_size + flat % MEMBERS
    chosen = tl.zeros([K_LANES], tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(order, 0)
        winner = tl.min(tl.where(order == best, expert_of, N_EXPERT), 0)
        chosen = tl.where(k == i, winner, chosen)
        order = tl.where(expert_of == winner, _TAKEN, order)

    out = token * TOP_K + k
    if ahead > 0:
        tl.store(next_ids + (ahead - 1) * (tl.num_programs(0) * TOP_K) + out, chosen, mask=is_choice)
        return

    # Gathering the few logits again is cheaper than one more reduction per choice
    picked = tl.load(row + chosen, mask=is_choice, other=float("-inf"))
    if REPLAY:
        chosen = recorded
    if HAS_TABLE:
        slot = tl.load(slot_table + chosen, mask=is_choice, other=-1)
    if GATING == "softmax_selected":
        picked_largest = tl.max(picked, 0)
        weight = tl.exp(picked - picked_largest)
        weight = tl.div_rn(weight, tl.sum(weight, 0))
    else:
        weight = tl.where(is_choice, _gate(picked, largest, total, GATING), 0.0)
    if NORMALIZE:
        weight = tl.div_rn(weight, tl.maximum(tl.sum(weight, 0), _SMALLEST_SUM))
    tl.store(ids + out, chosen, mask=is_choice)
    tl.store(weights + out, weight * scale, mask=is_choice)
    if HAS_TABLE:
        tl.store(slots + out, slot, mask=is_choice)


@launched
@triton.jit(do_not_specialize=["n_token"])
def logits_kernel(
    x,
    weight,
    next_weight,
    second_weight,
    logits,
    n_token,
    N_EXPERT: tl.constexpr,
    AHEAD: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    HIDDEN_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (e, i) multiplies row e of the router matrix with tokens `TOKENS * i` and following.

    AHEAD: how many of the next layers' matrices follow.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, HIDDEN_TILE)[None, :]
    matrix = _pick(expert // N_EXPERT, weight, next_weight, second_weight)
    row = matrix + (expert % N_EXPERT).to(tl.int64) * HIDDEN + lane
    if HIDDEN_TILE >= HIDDEN:  # a row is small enough to load before the wait
        w = tl.load(row, mask=lane < HIDDEN, other=0.0)
    zero = wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    token = tl.program_id(1) * TOKENS + zero + tl.arange(0, TOKENS)[:, None]
    values = x + token.to(tl.int64) * HIDDEN + lane
    sums = tl.zeros([TOKENS, HIDDEN_TILE], tl.float32)
    for start in tl.static_range(0, HIDDEN, HIDDEN_TILE):  # unrolled: all loads are in flight at once
        inside = start + lane < HIDDEN
        if HIDDEN_TILE < HIDDEN:
            w = tl.load(row + start, mask=inside, other=0.0)
        sums += w * tl.load(values + start, mask=inside & (token < n_token), other=0.0)
    tl.store(logits + token * (N_EXPERT * (1 + AHEAD)) + expert, tl.sum(sums, 1)[:, None], mask=token < n_token)
