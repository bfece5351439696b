"""LRU at all capacities at once, from stack distances (Mattson et al. 1970)."""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 19  # times of use that are held at once, [n_key, steps, n_pool]
_LARGEST = np.iinfo(np.int16).max


def lru_distances(
    keys: NDArray[np.integer], n_key: int, *, used_before: NDArray[np.integer] | None = None
) -> NDArray[np.int32]:
    """How many other keys were used since: keys [n_step, n_pool, n], distinct in a step; the result has that shape.

    The distance of a key is the number of keys of its pool whose last use, before this step, is later than its own;
    `n_key` if it was not used yet. So LRU with c >= n slots that evicts none of the running step's keys hits exactly
    where the distance is less than c. `used_before` [n_key] holds all keys, in the order of a use before step 0.
    """
    n_step, n_pool, n = keys.shape
    # Short integers compare twice as fast.
    short = max(n_key, n) < _LARGEST
    kind = np.int16 if short else np.int32
    never = np.iinfo(kind).min
    last = np.full((n_key, n_pool), never, kind)  # time of last use: negative in earlier blocks
    if used_before is not None:
        last[used_before] = np.arange(-n_key, 0)[:, None]
    distances = np.empty(keys.shape, np.int32)
    length = max(1, min(_BLOCK // (n_pool * n_key), _LARGEST // n if short else n_step))
    for start in range(0, n_step, length):
        block = keys[start : start + length].transpose(2, 0, 1).astype(np.intp)
        n_block = block.shape[1]
        times = np.full((n_key, n_block + 1, n_pool), never, kind)
        times[:, 0] = last
        # Index arithmetic by hand: numpy's indexing with three arrays takes several times as long.
        at = (block * (n_block + 1) + np.arange(n_block)[:, None]) * n_pool + np.arange(n_pool)
        times.reshape(-1)[at + n_pool] = np.arange(n_block * n, dtype=kind).reshape(n_block, n).T[..., None]
        np.maximum.accumulate(times, axis=1, out=times)
        own = times.reshape(-1).take(at)
        later = np.where(own == never, n_key, _count_later(times[:, :-1], own))
        distances[start : start + length] = later.transpose(1, 2, 0)
        # Only the order matters from here on.
        newest = times[:, -1]
        order = newest.argsort(axis=0).argsort(axis=0) - n_key
        last = np.where(newest == never, never, order).astype(kind)
    return distances


def _count_later(times: NDArray[np.signedinteger], own: NDArray[np.signedinteger]) -> NDArray[np.int32]:
    """How many of times [n_key, ...] are greater than own [n, ...]."""
    total = np.zeros(own.shape, np.int32)
    later = np.empty(own.shape, bool)
    for first in range(0, len(times), 255):  # as many as fit a byte, which adds up fastest
        part = np.zeros(own.shape, np.uint8)
        for of_key in times[first : first + 255]:
            np.greater(of_key, own, out=later)
            part += later.view(np.uint8)
        total += part
    return total
