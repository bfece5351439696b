"""The Triton kernels that `sampling_kernel` launches. One row of logits per sequence; all randomness is Philox."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

RECENT = tl.constexpr(1)  # flags of a sequence's token: it is in the ring, or must never be drawn
SUPPRESSED = tl.constexpr(2)
WINDOW = tl.constexpr(64)  # tokens in the ring
_NAN_ORDER = tl.constexpr(0x7FFFFFFF)  # above the order of any number
_NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def _adjusted(logits, flags, token, penalty, n_vocab):
    """Logits after suppression and repeat penalty; NaN where they were not finite, no negative zeros."""
    logit = tl.load(logits + token, mask=token < n_vocab, other=0.0)
    flag = tl.load(flags + token, mask=token < n_vocab, other=0)
    penalized = tl.where(logit > 0.0, tl.div_rn(logit, penalty), logit * penalty)
    value = tl.where((flag & RECENT) != 0, penalized, logit)
    value = tl.where((flag & SUPPRESSED) != 0, float("-inf"), value)
    value = tl.where(value == 0.0, 0.0, value)
    return tl.where(tl.abs(logit) < float("inf"), value, float("nan"))


@triton.jit
def _keys(logits, flags, token, penalty, n_vocab):
    """An int64 per token that orders as the adjusted logit does, ties by the lowest token, NaN greatest."""
    value = _adjusted(logits, flags, token, penalty, n_vocab)
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value != value, _NAN_ORDER, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    return tl.where(token < n_vocab, key, _NO_KEY)


@triton.jit
def _token_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _value_of(key):
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def uniform(seed, position):
    """A number in (0, 1), f64: the first of four words of Philox 4x32-10."""
    word, _, _, _ = tl.philox(seed, position, 0, 0, 0)
    return (word.to(tl.float64) + 0.5) * (1.0 / (1 << 32))


@triton.jit
def _emit(token, damaged, row, position, out, bad, ring, flags, n_vocab):
    """Writes the token and makes it the latest of the ring; an idle sequence (position <= 0) stays as it is."""
    active = position > 0
    tl.store(out + row, token, mask=active)
    tl.store(bad + row, 1, mask=active & damaged)
    lane = tl.arange(0, WINDOW)
    slot = position & (WINDOW - 1)
    tokens = tl.load(ring + row * WINDOW + lane)
    tl.debug_barrier()  # every warp has read the ring before one writes to it
    oldest = tl.sum(tl.where(lane == slot, tokens, 0), 0)
    tokens = tl.where(lane == slot, token, tokens)
    tl.store(ring + row * WINDOW + slot, token, mask=active)
    flags += row.to(tl.int64) * n_vocab
    known = active & (oldest >= 0) & (oldest < n_vocab) & (oldest != token)
    again = tl.max((tokens == oldest).to(tl.int32), 0)
    kept = tl.load(flags + oldest, mask=known, other=0) & SUPPRESSED
    tl.store(flags + oldest, (kept | again).to(tl.uint8), mask=known)
    tl.store(flags + token, tl.load(flags + token, mask=active, other=0) | RECENT, mask=active)


@triton.jit
def maxima_kernel(
    logits, flags, penalty, keys, n_row, n_vocab, n_block, n_key, GROUP: tl.constexpr, BLOCKS: tl.constexpr
):
    """Program (i, row): the greatest keys of `BLOCKS` blocks of `GROUP` groups of `GROUP` tokens, and of the groups."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    group = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    token = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    key = tl.max(_keys(logits + row * n_row, flags + row * n_vocab, token, tl.load(penalty + row), n_vocab), 2)
    keys += row * n_key
    tl.store(keys + block, tl.max(key, 1), mask=block < n_block)
    tl.store(keys + n_block + group, key, mask=group < n_key - n_block)


@triton.jit
def greedy_kernel(keys, positions, out, bad, ring, flags, n_vocab, n_block, n_key, LANES: tl.constexpr):
    """Program row: the best of the blocks' best."""
    row = tl.program_id(0)
    block = tl.arange(0, LANES)
    best = tl.max(tl.load(keys + row * n_key + block, mask=block < n_block, other=_NO_KEY), 0)
    value = _value_of(best)
    _emit(_token_of(best), value != value, row, tl.load(positions + row), out, bad, ring, flags, n_vocab)


@triton.jit
def _top_p_limit(top_p, total):
    """A candidate stays while the weights before it are below this."""
    return tl.where(top_p >= 1.0, float("inf"), top_p.to(tl.float64) * total)


@triton.jit
def _merge(cube, BITS: tl.constexpr, LAST: tl.constexpr):
    """Sorts bitonic runs of `2 ** BITS`, descending; every other one ascending, unless `LAST`."""
    n: tl.constexpr = len(cube.shape)  # an axis is a bit of the index
    descending = 1 if LAST else tl.reshape(tl.arange(0, 2), [1] * (n - 1 - BITS) + [2] + [1] * BITS)
    for i in tl.static_range(BITS):
        other = tl.sum(cube, n - BITS + i, keep_dims=True) - cube
        second = tl.reshape(tl.arange(0, 2), [1] * (n - BITS + i) + [2] + [1] * (BITS - 1 - i))
        cube = tl.where((cube > other) != (descending ^ second).to(tl.int1), other, cube)
    return cube


@triton.jit
def top_keys(keys, LOG_N: tl.constexpr, LOG_K: tl.constexpr):
    """The `2 ** LOG_K` greatest of `2 ** LOG_N` keys, descending. As tl.topk, which takes seconds in the interpreter:
    sorts runs, then takes maxima of two, one of them ascending: these are the best of both, and bitonic."""
    cube = tl.reshape(keys, [2] * LOG_N)
    for i in tl.static_range(1, LOG_K + 1):
        cube = _merge(cube, i, i == LOG_N)
    for i in tl.static_range(LOG_K + 1, LOG_N + 1):
        cube = _merge(tl.max(cube, LOG_N - i), LOG_K, i == LOG_N)
    return tl.reshape(cube, [2**LOG_K])


@triton.jit
def few_kernel(
    logits,
    keys,
    positions,
    temperature,
    top_k,
    top_p,
    min_p,
    penalty,
    seed,
    out,
    bad,
    ring,
    flags,
    n_row,
    n_vocab,
    n_block,
    n_key,
    FIRST: tl.constexpr,
    LOG_GROUP: tl.constexpr,
    LOG_K: tl.constexpr,
):
    """Program row: a draw from the best `top_k` <= K = `2 ** LOG_K` tokens.

    They are in the K groups with the greatest keys: were one elsewhere, each of those groups would hold a better one.
    Likewise the groups are in the K best blocks. FIRST: where to begin: 0 with blocks, 1 with groups, 2 with tokens.
    """
    K: tl.constexpr = 2**LOG_K
    GROUP: tl.constexpr = 2**LOG_GROUP
    row = tl.program_id(0)
    # Read early: nothing waits for them then
    position, key_of_draws = tl.load(positions + row), tl.load(seed + row)
    t, k = tl.load(temperature + row).to(tl.float64), tl.minimum(tl.load(top_k + row), n_vocab)
    p, share = tl.load(top_p + row), tl.load(min_p + row).to(tl.float64)
    factor = tl.load(penalty + row)
    wide = row.to(tl.int64)
    keys += wide * n_key
    rank = tl.arange(0, K)
    chosen = rank
    best = tl.full([K], _NO_KEY, tl.int64)
    for level in range(FIRST, 3):
        index = tl.reshape(chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [K * GROUP])
        if level == 2:
            key = _keys(logits + wide * n_row, flags + wide * n_vocab, index, factor, n_vocab)
        else:
            start = tl.where(level == 0, 0, n_block)
            end = tl.where(level == 0, n_block, n_key)
            key = tl.load(keys + start + index, mask=start + index < end, other=_NO_KEY)
        best = top_keys(key, LOG_K + LOG_GROUP, LOG_K)
        chosen = _token_of(best) >> ((2 - level) * LOG_GROUP)
        chosen = tl.minimum(chosen, n_vocab)  # without a key: past the end

    best_value = _value_of(tl.max(best, 0))
    gap = _value_of(best).to(tl.float64) - best_value.to(tl.float64)
    weight = tl.where(rank < k, tl.exp(gap), 0.0)
    before = tl.cumsum(weight, 0) - weight
    keep = (before < _top_p_limit(p, tl.sum(weight, 0))) & (rank < k)
    keep &= weight >= share
    n = tl.where(t == 0.0, 1, tl.maximum(tl.sum(keep.to(tl.int32), 0), 1))

    weight = tl.where(rank < n, tl.exp(gap / tl.where(t == 0.0, 1.0, t)), 0.0)
    target = uniform(key_of_draws, position) * tl.sum(weight, 0)
    place = tl.sum(((tl.cumsum(weight, 0) <= target) & (rank < n)).to(tl.int32), 0)
    drawn = tl.sum(tl.where(rank == tl.minimum(place, n - 1), _token_of(best), 0), 0)
    _emit(drawn, best_value != best_value, row, position, out, bad, ring, flags, n_vocab)


@triton.jit
def adjust_kernel(logits, flags, penalty, adjusted, n_row, n_vocab, TILE: tl.constexpr):
    """Program (i, row): the adjusted logits of `TILE` tokens, to be sorted."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = _adjusted(logits + row * n_row, flags + row * n_vocab, token, tl.load(penalty + row), n_vocab)
    tl.store(adjusted + row * n_vocab + token, value, mask=token < n_vocab)


@triton.jit
def _gaps(values, rank, n_vocab):
    """How far sorted logits are below the first, f64; minus infinity past the end."""
    value = tl.load(values + rank, mask=rank < n_vocab, other=float("-inf"))
    return value.to(tl.float64) - tl.load(values).to(tl.float64)


@triton.jit
def sums_kernel(values, temperature, top_k, min_p, sums, n_vocab, N_CHUNK: tl.constexpr, CHUNK: tl.constexpr):
    """Program (i, row): of chunk i of the sorted logits, the weights' sum, the same at the temperature, and how many
    are not below min_p."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rank = chunk * CHUNK + tl.arange(0, CHUNK)
    gap = _gaps(values + row * n_vocab, rank, n_vocab)
    k = tl.load(top_k + row)
    k = tl.where(k == 0, n_vocab, tl.minimum(k, n_vocab))
    weight = tl.where(rank < k, tl.exp(gap), 0.0)
    t = tl.load(temperature + row).to(tl.float64)
    tempered = tl.exp(gap / tl.where(t == 0.0, 1.0, t))
    above = (weight >= tl.load(min_p + row).to(tl.float64)) & (rank < k)
    sums += row * 3 * N_CHUNK + chunk
    tl.store(sums, tl.sum(weight, 0))
    tl.store(sums + N_CHUNK, tl.sum(tempered, 0))
    tl.store(sums + 2 * N_CHUNK, tl.sum(above.to(tl.int32), 0).to(tl.float64))


@triton.jit
def draw_kernel(
    values,
    ids,
    sums,
    positions,
    temperature,
    top_k,
    top_p,
    seed,
    out,
    bad,
    ring,
    flags,
    n_vocab,
    N_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program row: a draw from sorted logits. Chunks' sums say in which chunk a limit falls; only that one is read."""
    row = tl.program_id(0)
    # Read early: nothing waits for them then
    position, key_of_draws = tl.load(positions + row), tl.load(seed + row)
    t, k, p = tl.load(temperature + row).to(tl.float64), tl.load(top_k + row), tl.load(top_p + row)
    k = tl.where(k == 0, n_vocab, tl.minimum(k, n_vocab))
    values += row.to(tl.int64) * n_vocab
    chunk, lane = tl.arange(0, LANES), tl.arange(0, CHUNK)
    sums += row * 3 * N_CHUNK + chunk
    sum_ = tl.load(sums, mask=chunk < N_CHUNK, other=0.0)
    tempered = tl.load(sums + N_CHUNK, mask=chunk < N_CHUNK, other=0.0)
    above = tl.load(sums + 2 * N_CHUNK, mask=chunk < N_CHUNK, other=0.0)

    # What top-p keeps: all chunks before the last that begins under the limit, and a part of that one
    limit = _top_p_limit(p, tl.sum(sum_, 0))
    under = (tl.cumsum(sum_, 0) - sum_ < limit) & (chunk < N_CHUNK)
    cut = tl.maximum(tl.sum(under.to(tl.int32), 0) - 1, 0)
    rank = cut * CHUNK + lane
    weight = tl.where(rank < k, tl.exp(_gaps(values, rank, n_vocab)), 0.0)
    before = tl.sum(tl.where(chunk < cut, sum_, 0.0), 0) + tl.cumsum(weight, 0) - weight
    n = cut * CHUNK + tl.sum(((before < limit) & (rank < k)).to(tl.int32), 0)
    n = tl.maximum(tl.minimum(n, tl.sum(above, 0).to(tl.int32)), 1)  # `above` is at most k
    n = tl.where(t == 0.0, 1, n)

    # The total at the temperature, in the same way
    t = tl.where(t == 0.0, 1.0, t)
    last = (n - 1) // CHUNK
    rank = last * CHUNK + lane
    weight = tl.where(rank < n, tl.exp(_gaps(values, rank, n_vocab) / t), 0.0)
    total = tl.sum(tl.where(chunk < last, tempered, 0.0), 0) + tl.sum(weight, 0)
    target = uniform(key_of_draws, position) * total

    # The place of the target: its chunk, then the place in it
    found = tl.sum(((tl.cumsum(tempered, 0) <= target) & (chunk < last)).to(tl.int32), 0)
    rank = found * CHUNK + lane
    weight = tl.where(rank < n, tl.exp(_gaps(values, rank, n_vocab) / t), 0.0)
    cumulative = tl.sum(tl.where(chunk < found, tempered, 0.0), 0) + tl.cumsum(weight, 0)
    place = found * CHUNK + tl.sum(((cumulative <= target) & (rank < n)).to(tl.int32), 0)
    drawn = tl.load(ids + row.to(tl.int64) * n_vocab + tl.minimum(place, n - 1)).to(tl.int32)
    best = tl.load(values)
    _emit(drawn, best != best, row, position, out, bad, ring, flags, n_vocab)
