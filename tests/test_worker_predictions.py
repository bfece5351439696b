"""The decode worker against a GPU's side in Python: what is done with predictions of the next layers."""

import time

import numpy as np
import pytest
from fake_gpu import LAYOUTS, N_LAYER, FakeGpu, random_ids

from moe_engine.kernels import _cpu
from moe_engine.kernels.worker import Rates

IDS = random_ids(np.random.default_rng(0), 2)
EXPERT_BYTES = [layout.gate.nbytes + layout.up.nbytes + layout.down.nbytes for layout in LAYOUTS]


@pytest.mark.parametrize("threads", [1, 2, 4, 8])  # of which each has as many rows
def test_expected_misses_are_pulled_into_the_caches(threads: int) -> None:
    """All of each expert, once, but for the share of the worker's own thread."""
    gpu = FakeGpu("cpu", (0, 0), threads=threads)
    gpu.ahead = [np.array([[[5, 0]], [[4, 1]], [[2, 3]]])]
    shares = [2 * n_bytes // threads * (threads - 1) for n_bytes in EXPERT_BYTES]
    gpu.worker.expect(1, 1, True)
    pulled = 0
    for layer in range(N_LAYER):
        gpu.layer(1, layer, IDS[layer, :1], True, np.random.default_rng(0))
        pulled += shares[layer + 1] if layer + 1 < N_LAYER else 0
        deadline = time.monotonic() + 20
        while gpu.worker.stats().pulled_bytes < pulled:  # counted once all threads are done
            assert time.monotonic() < deadline
            time.sleep(0.001)
    gpu.finish(1, [1])
    assert gpu.worker.wait_tokens(1) is not None
    assert gpu.worker.stats().pulled_bytes == sum(shares[1:])


@pytest.mark.parametrize(("limit", "most"), [(0, 0), (100, 200 * (N_LAYER - 1))])
def test_pulling_is_limited(limit: int, most: int) -> None:
    gpu = FakeGpu("cpu", (0, 0), threads=2, lookahead_bytes=limit)
    gpu.ahead = [IDS]
    gpu.step(1, IDS)
    assert gpu.worker.stats().pulled_bytes <= most


def test_predictions_keep_score() -> None:
    gpu = FakeGpu("cpu", (12, 6), max_background=100)
    ids = np.array([[[0, 1]], [[2, 3]], [[4, 5]]])
    gpu.ahead = [np.array([[[0, 0]], [[3, 0]], [[-1, 1]]])]
    gpu.step(1, ids)
    stats = gpu.worker.stats()
    assert (stats.expected, stats.missed_experts, stats.foreseen) == ([0, 2, 1], [0, 2, 2], [0, 1, 0])
    gpu.worker.settle()
    gpu.step(2, ids)  # all hit; of what is predicted, two experts are in no slot
    stats = gpu.worker.stats()
    assert (stats.expected, stats.missed_experts, stats.foreseen) == ([0, 3, 2], [0, 2, 2], [0, 1, 0])
    gpu.ahead = []
    gpu.step(3, ids)
    assert gpu.worker.stats().expected == [0, 3, 2]
    gpu.worker.reset_stats()
    assert gpu.worker.stats().expected == gpu.worker.stats().foreseen == [0] * N_LAYER


CHOICES = np.array([[[0, 1]], [[2, 3]], [[4, 5]]])


@pytest.mark.parametrize(
    ("predicted", "arrives", "outcome"), [(4, True, (1, 0)), (4, False, (0, 1)), (2, True, (0, 0))]
)
def test_a_prefetch_is_there_two_layers_later(predicted: int, arrives: bool, outcome: tuple[int, int]) -> None:
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu("cpu", (12, 6), max_background=1, copies=engine)
    gpu.ahead = [np.full_like(CHOICES, -1), np.full_like(CHOICES, predicted)]
    rng = np.random.default_rng(0)
    gpu.worker.expect(1, 1, True)
    gpu.layer(1, 0, CHOICES[0], True, rng)
    if arrives:
        engine.release(1)
        deadline = time.monotonic() + 20
        while int(gpu.table[2, predicted]) < 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    gpu.layer(1, 1, CHOICES[1], True, rng)
    hits, _, _ = gpu.layer(1, 2, CHOICES[2], True, rng)
    gpu.finish(1, [1])
    assert gpu.worker.wait_tokens(1) is not None
    stats = gpu.worker.stats()
    assert (hits, 0) == (outcome[0], 0)
    assert stats.prefetched == [0, 0, 1]
    assert (stats.prefetched_in_time, stats.prefetched_late) == ([0, 0, outcome[0]], [0, 0, outcome[1]])
    engine.release(100)


def test_a_prefetch_for_the_next_layer_runs_beside_the_cpu() -> None:
    """Its copy begins before the answer; once it is there, it is a hit, and nothing else about the step changes."""
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu("cpu", (12, 4), max_background=0, copies=engine, meanwhile=lambda: engine.release(1))
    rng = np.random.default_rng(0)
    for step in range(1, 30):
        choices = CHOICES.copy()
        choices[1] = 2 * step % 6 + np.arange(2)  # layer 1 has slots for two steps' experts
        gpu.ahead = [choices, np.full_like(choices, -1)]
        gpu.worker.expect(step, 1, True)
        gpu.layer(step, 0, choices[0], True, rng)
        foreseen = gpu.worker.stats().fetched_background
        gpu.layer(step, 1, choices[1], True, rng)
        gpu.layer(step, 2, choices[2], True, rng)
        assert gpu.worker.stats().fetched_background == foreseen  # only layer 0 can look two layers ahead
        gpu.finish(step, [step])
        assert gpu.worker.wait_tokens(step) is not None
    stats = gpu.worker.stats()
    engine.release(1000)
    assert stats.prefetched[1] > 10
    assert stats.prefetched[0] == stats.prefetched[2] == 0
    assert stats.prefetched_in_time[1] + stats.prefetched_late[1] == stats.prefetched[1]  # all were chosen
    assert stats.hits[1] >= stats.prefetched_in_time[1] > 0
    gpu.worker.settle()
    gpu.worker.check_integrity()


@pytest.mark.parametrize(("copy", "n"), [(1e12, 2), (1e3, 0)])
def test_copies_for_the_next_layer_begin_if_they_can_arrive(copy: float, n: int) -> None:
    """Before its message: the CPU takes milliseconds for this layer's misses."""
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu("cpu", (12, 6), max_background=0, copies=engine, rates=Rates(cpu=1e6, copy=copy))
    gpu.ahead = [CHOICES, np.full_like(CHOICES, -1)]
    rng = np.random.default_rng(0)
    gpu.worker.expect(1, 1, False)
    for layer in range(2):
        gpu.layer(1, layer, CHOICES[layer], False, rng)
    stats = gpu.worker.stats()
    assert stats.prefetched[:2] == [0, n]
    assert stats.prefetched_late[:2] == [0, n]  # the copies are held
    engine.release(100)


def test_what_must_be_fetched_waits_for_slots_of_prefetches() -> None:
    """Layer 2 needs every slot of its class, but of two the wrong experts are on their way."""
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu("exact", (4, 4), copies=engine, meanwhile=lambda: engine.release(1))
    ids = np.array([[[0, 1], [0, 1]], [[0, 1], [0, 1]], [[0, 1], [2, 3]]])
    predicted = np.array([[[4, 3], [5, 2]]] * N_LAYER)
    gpu.ahead = [predicted, predicted]
    for step in range(1, 4):
        gpu.step(step, ids)
    assert gpu.worker.stats().prefetched[2] > 1
    gpu.worker.settle()
    gpu.worker.check_integrity()


def test_what_is_fetched_now_evicts_nothing_that_is_predicted() -> None:
    gpu = FakeGpu("auto", (4, 6), rates=Rates(cpu=1e3, copy=1e12), max_background=0)
    ids = np.array([[[0, 1]], [[0, 1]], [[2, 3]]])
    longest_ago, one_missed = ids.copy(), ids.copy()
    longest_ago[2], one_missed[0] = -1, [[0, 4]]
    for choices in (ids, longest_ago):  # fills the slots; then layer 2's experts are those used longest ago
        gpu.step(1 if choices is ids else 2, choices)
        gpu.worker.settle()
    gpu.ahead = [ids, ids]
    found = gpu.step(3, one_missed)
    assert found[0] == (1, 0, 1)
    assert found[2] == (2, 0, 0)


def test_useless_prefetches_end() -> None:
    gpu = FakeGpu("cpu", (2, 0), max_background=1)
    n_step = 60
    for step in range(1, n_step + 1):
        gpu.ahead = [CHOICES, np.full_like(CHOICES, step % 4)]  # 4 and 5 are chosen
        gpu.step(step, CHOICES)
        gpu.worker.settle()
    stats = gpu.worker.stats()
    assert 1 < stats.prefetched[2] < n_step // 2
    assert sum(stats.prefetched_in_time) == sum(stats.prefetched_late) == 0
    gpu.worker.check_integrity()


def test_steps_are_timed_apart() -> None:
    """Of steps 6 to 11, which followed another at once, 8 to 11 prefetch, and 9 and 11 may compute misses late."""
    gpu = FakeGpu("cpu")
    for step in range(1, 5):
        gpu.ahead = [CHOICES] * (2 if step % 2 else 1)
        gpu.step(step, CHOICES)
    assert gpu.worker.stats().timed == ((0, 0), (0, 0))  # none was waiting when the one before ended
    gpu.worker.expect(5, 1, False)
    for step in range(5, 12):
        gpu.worker.expect(step + 1, 1, step + 1 in (9, 11), pull=step + 1 == 10)
        gpu.ahead = [CHOICES] * (2 if step >= 8 else 1)
        gpu.layers(step, CHOICES)
        assert gpu.worker.wait_tokens(step) is not None
    (n_without, without), (n_with, with_) = gpu.worker.stats().timed
    assert (n_without, n_with) == (2, 4)
    assert min(without, with_) > 0
    (n_cpu, cpu), (n_late, late) = gpu.worker.stats().timed_late
    assert (n_cpu, n_late, cpu + late) == (4, 2, without + with_)
    (n_left, left), (n_pulled, pulled) = gpu.worker.stats().timed_pulled
    assert (n_left, n_pulled, left + pulled) == (5, 1, without + with_)
