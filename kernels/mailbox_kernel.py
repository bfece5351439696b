"""The Triton kernels that `mailbox.py` launches: a layer's misses to the host, its answer back, the sampled tokens out.

Tokens are written first, then their number; a fence in between makes the order hold across PCIe. Messages have checks
in its place: a fence takes 1.2 us of a layer's time on an H200, and 6 beside copies. The zero that says that the
previous kernel is complete (`decode_overlap`) is multiplied with a block's size before it is added: elements keep their
alignment, and four move at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_overlap import let_next_kernel_start, wait_for_previous_kernel


@triton.jit
def _fence(ON_GPU: tl.constexpr):
    """What the program's threads have written is visible to the host before what they write next."""
    if ON_GPU:
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()


@triton.jit
def _nanoseconds(ON_GPU: tl.constexpr):
    if ON_GPU:
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    else:
        return tl.full([], 0, tl.int64)


@triton.jit
def _words(values, real):
    """The sum of 32-bit words, for `_check`."""
    return tl.sum(tl.where(real, values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF, 0), 0)


@triton.jit
def _check(number, words):
    """What tells the host that all of these words are there, and are those of this message."""
    return (number << 32) | (words & 0xFFFFFFFF)


@triton.jit
def post_kernel(
    headers,
    fields,
    field_weights,
    x_out,
    x_checks,
    step,
    positions,
    ids,
    weights,
    slots,
    x,
    ahead,
    n_replay,
    stamps,
    layer,
    REPLAY: tl.constexpr,
    AHEAD: tl.constexpr,
    TIMED: tl.constexpr,
    N_LAYER: tl.constexpr,
    RING: tl.constexpr,
    MESSAGE_BYTES: tl.constexpr,
    IDS_AT: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    SLOTS_AT: tl.constexpr,
    AHEAD_AT: tl.constexpr,
    AHEAD_BYTES: tl.constexpr,
    N_TOKEN: tl.constexpr,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    N_X: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program i copies block i of x where something is missed, program 0 also writes the message.

    AHEAD: of how many next layers guesses are sent. REPLAY: what was guessed is in `ahead`, `[*, n_replay, N_LAYER,
    TOP_K]`, by steps as for the router's `Replay`.
    """
    program = tl.program_id(0)
    zero = wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    s = tl.load(step + zero)
    number = s * (N_LAYER + 1) + layer
    record = (s % RING) * N_LAYER + layer
    pair = zero * PAIRS + tl.arange(0, PAIRS)
    real = pair < N_TOKEN * TOP_K
    active = real & (tl.load(positions + pair // TOP_K, mask=real, other=-1) >= 0)
    expert = tl.where(active, tl.load(ids + pair, mask=real, other=-1), -1)
    slot = tl.where(active, tl.load(slots + pair, mask=real, other=-1), -1)
    n_missed = tl.sum((active & (slot < 0)).to(tl.int32), 0)
    if program == 0:
        tl.store(ids + pair, expert, mask=real)
        tl.store(slots + pair, slot, mask=real)
        first = record * (MESSAGE_BYTES // 4) + pair
        tl.store(fields + first + IDS_AT // 4, expert, mask=real)
        weight = tl.load(weights + pair, mask=real, other=0.0)
        tl.store(field_weights + first + WEIGHTS_AT // 4, weight, mask=real)
        tl.store(fields + first + SLOTS_AT // 4, slot, mask=real)
        words = N_TOKEN + AHEAD + n_missed + _words(expert, real) + _words(weight, real) + _words(slot, real)
        for i in tl.static_range(AHEAD):
            if REPLAY:
                source = (s + pair // TOP_K * 97) % n_replay * N_LAYER + layer
                guessed = ahead + (i * n_replay * N_LAYER + source + i + 1) * TOP_K + pair % TOP_K
            else:
                guessed = ahead + i * N_TOKEN * TOP_K + pair
            guess = tl.where(active, tl.load(guessed, mask=real, other=-1), -1)
            tl.store(fields + first + (AHEAD_AT + i * AHEAD_BYTES) // 4, guess, mask=real)
            words += _words(guess, real)
        header = headers + record * (MESSAGE_BYTES // 8)
        tl.store(header + 1, tl.full([], N_TOKEN, tl.int64))
        tl.store(header + 2, n_missed.to(tl.int64))
        tl.store(header + 3, tl.full([], AHEAD, tl.int64))
        tl.store(header + 4, _check(number, words))
        tl.store(header, number)
    if n_missed > 0:
        lane = (zero + program) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + lane, mask=lane < N_X, other=0.0)
        tl.store(x_out + lane, value, mask=lane < N_X)
        tl.store(x_checks + (zero + program) * 8, _check(number, _words(value, lane < N_X)))
    if TIMED and program == 0:
        tl.store(stamps + 3 * layer, _nanoseconds(ON_GPU))


@triton.jit
def _look(number, ON_GPU: tl.constexpr):
    """What is at `number` now; what was written before it is visible to whoever sees it.

    On the way to the host a fence behind a load takes a microsecond more, and two or three beside copies.
    """
    if ON_GPU:
        address = number.to(tl.int64)
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        return tl.load(number)


@triton.jit
def _given_up(control):
    """Not zero where the host has called the run off, or the GPU has."""
    return tl.load(control, volatile=True) | tl.load(control + 1, volatile=True)


@triton.jit
def wait_kernel(
    answer_numbers,
    answer,
    answer_fields,
    control,
    y,
    step,
    ids,
    slots,
    late,
    table,
    hits,
    out,
    waited,
    stamps,
    layer,
    time_out,
    TIMED: tl.constexpr,
    N_LAYER: tl.constexpr,
    LATE_AT: tl.constexpr,
    EVICTED_AT: tl.constexpr,
    N_TOKEN: tl.constexpr,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    N_X: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_HITS: tl.constexpr,
    LATE: tl.constexpr,
    MERGE: tl.constexpr,
    ON_GPU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program i adds block i of what the CPU answers; program 0 also updates the slot table.

    answer_numbers: a line for each program, for the bus serves reads of one line one after the other, in 1.4 us each.
    Four times the answer's number, and its flags (1: y is to be added, 2: experts were fetched).

    LATE: experts fetched for this very step go to `late`, else -1. MERGE: they go into `slots`, and nothing is added.
    time_out: nanoseconds on a GPU, looks elsewhere.
    """
    program = tl.program_id(0)
    zero = wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)  # it is there when the answer comes
    if TIMED and program == 0:
        tl.store(stamps + 3 * layer + 1 + zero, _nanoseconds(ON_GPU))
    pair = zero * PAIRS + tl.arange(0, PAIRS)
    real = pair < N_TOKEN * TOP_K
    slot = tl.load(slots + pair, mask=real, other=0)
    missed = real & (slot < 0) & (tl.load(ids + pair, mask=real, other=-1) >= 0)
    n_missed = tl.sum(missed.to(tl.int32), 0)
    lane = (zero + program) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < N_X
    total = tl.zeros([BLOCK], tl.float32)
    fetched = tl.full([PAIRS], -1, tl.int32)
    if HAS_HITS:
        total += tl.load(hits + lane, mask=inside, other=0.0)
    if n_missed > 0:
        want = tl.load(step + zero) * (N_LAYER + 1) + layer
        start = _nanoseconds(ON_GPU)
        spent = tl.full([], 0, tl.int64)
        seen = _look(answer_numbers + program * 8, ON_GPU)
        gone = tl.full([], 0, tl.int64)
        if program == 0:
            gone = _given_up(control)
        looks = 0
        while (seen // 4 != want) & (gone == 0):
            seen = _look(answer_numbers + program * 8, ON_GPU)
            looks += 1
            if looks % (1024 if ON_GPU else 8) == 0:  # seldom: all look at this one
                gone = _given_up(control)
            if ON_GPU:
                spent = _nanoseconds(ON_GPU) - start
            else:
                spent += 1
            if spent > time_out:  # a dead worker must not hang the GPU
                gone = tl.full([], 1, tl.int64)
                tl.store(control + 1, gone)
        if seen // 4 == want:
            # All that may be needed is asked for at once: each load takes a trip over the bus.
            if not MERGE:
                computed = tl.load(y + lane, mask=inside, other=0.0, cache_modifier=".cv")
            if program == 0:
                n_evicted = tl.load(answer, volatile=True)
                place = tl.arange(0, 2 * PAIRS)
                index = tl.load(
                    answer_fields + EVICTED_AT // 4 + place, mask=place < 2 * N_TOKEN * TOP_K, other=0, volatile=True
                )
                slot_of_late = tl.load(answer_fields + LATE_AT // 4 + pair, mask=real, other=-1, volatile=True)
                fetched = tl.where((seen & 2) != 0, slot_of_late, -1)
                tl.store(table + index, -1, mask=place < n_evicted)
            if not MERGE:
                total += tl.where((seen & 1) != 0, computed, 0.0)
        if ON_GPU and program == 0:
            total_wait = waited + layer + zero
            tl.store(total_wait, tl.load(total_wait) + _nanoseconds(ON_GPU) - start)
    if TIMED and program == 0:
        tl.store(stamps + 3 * layer + 2, _nanoseconds(ON_GPU))
    if program == 0:
        if MERGE:
            tl.store(slots + pair, fetched, mask=missed)
        elif LATE:
            tl.store(late + pair, fetched, mask=real)
    if not MERGE:
        tl.store(out + lane, total, mask=inside)


@triton.jit
def finish_kernel(
    headers,
    fields,
    step,
    positions,
    tokens,
    bad,
    stamps,
    TIMED: tl.constexpr,
    N_LAYER: tl.constexpr,
    RING: tl.constexpr,
    TOKEN_BYTES: tl.constexpr,
    N_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ON_GPU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Sends a step's tokens to the host, and moves on to the next step and positions."""
    zero = wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    if TIMED:
        tl.store(stamps + 3 * N_LAYER, tl.load(stamps + 3 * N_LAYER + 1 + zero))
        tl.store(stamps + 3 * N_LAYER + 1, _nanoseconds(ON_GPU))
    s = tl.load(step + zero)
    record = s % RING
    lane = zero + tl.arange(0, TOKENS)
    real = lane < N_TOKEN
    token = tl.load(tokens + lane, mask=real, other=0)
    position = tl.load(positions + lane, mask=real, other=-1)
    tl.store(fields + record * (TOKEN_BYTES // 4) + 16 + lane, token, mask=real)
    header = headers + record * (TOKEN_BYTES // 8)
    tl.store(header + 1, tl.full([], N_TOKEN, tl.int64))
    is_bad = (tl.load(bad + lane, mask=real, other=0) != 0) & (position >= 0)
    tl.store(header + 2, tl.max(is_bad.to(tl.int64), 0))
    tl.store(positions + lane, tl.where(position >= 0, position + 1, position), mask=real)
    _fence(ON_GPU)
    tl.store(step, s + 1)
    tl.store(header, s * (N_LAYER + 1) + N_LAYER, cache_modifier=".wt")
