"""The decode worker against a GPU's side in Python: answers, slots, statistics, copies."""

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_gpu import IMAGES, LAYOUTS, MAX_BATCH, N_EXPERT, N_LAYER, PACKED, SEPARATE, TOP_K, FakeGpu, random_ids
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_engine.benchmark.engine_replay import simulated_hits
from moe_engine.expert_cache import SlotPool
from moe_engine.kernels import _cpu
from moe_engine.kernels.worker import MAX_AHEAD, RING, Mailbox, Mode, Rates
from moe_engine.policies.registry import policy_of

MODES: list[Mode] = ["cpu", "fetch", "auto", "exact"]
IDS = random_ids(np.random.default_rng(0), 2)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10)
# An expert that leaves for one of the step is foreseen to be needed: it is not fetched by the same answer.
@example(seed=100000, n_token=4, spare=(0, 0), releases=[0, 0, 0], allow_late=[False] * 3, predicts=2)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_token=st.integers(1, MAX_BATCH),
    spare=st.tuples(st.integers(-N_EXPERT, 4), st.integers(-N_EXPERT, 4)),
    releases=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    allow_late=st.lists(st.booleans(), min_size=3, max_size=3),
    predicts=st.integers(0, MAX_AHEAD),
)
def test_any_interleaving(
    mode: Mode,
    seed: int,
    n_token: int,
    spare: tuple[int, int],
    releases: list[int],
    allow_late: list[bool],
    predicts: int,
) -> None:
    """Copies end when hypothesis says so, at the latest when an answer is waiting for them."""
    exact = mode == "exact"
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu(
        mode,
        [min(N_EXPERT, n_token * TOP_K) + abs(n) if exact else N_EXPERT + n for n in spare],
        copies=engine,
        rates=Rates(cpu=1e9, copy=1e9, cpu_fixed=0, copy_fixed=0),
        meanwhile=lambda: engine.release(1),
    )
    rng = np.random.default_rng(seed)
    counts = []
    for step, (release, late) in enumerate(zip(releases, allow_late, strict=True), 1):
        engine.release(release)
        ids = random_ids(rng, n_token)
        if n_token > 1:
            ids[:, rng.integers(n_token)] = -1  # a token of no sequence
        gpu.ahead = [random_ids(rng, n_token) for _ in range(predicts)]
        counts.append(gpu.step(step, ids, late or exact))
    stats = gpu.worker.stats()
    assert stats.steps == len(counts)
    assert stats.hits == [sum(step[layer][0] for step in counts) for layer in range(N_LAYER)]
    assert stats.misses == [sum(sum(step[layer][1:]) for step in counts) for layer in range(N_LAYER)]
    assert stats.fetched_used + stats.fetched_unused <= stats.fetched_now + stats.fetched_background
    gpu.worker.stop()


def test_many_steps_two_ahead() -> None:
    """As the engine runs: a step is launched before the tokens of the one before have been taken."""
    n_step, failures = 10 * RING, []
    gpu = FakeGpu("auto", (7, 4))
    launched = threading.Semaphore(0)

    def device() -> None:
        try:
            for step in range(1, n_step + 1):
                launched.acquire()
                gpu.layers(step, random_ids(np.random.default_rng(step), 3))
        except BaseException as error:
            failures.append(error)
            gpu.mailbox.control[0] = 1

    thread = threading.Thread(target=device)
    thread.start()
    for step in range(1, n_step + 1):
        gpu.worker.expect(step, 3, allow_late=True)
        launched.release()
        if step > 1:
            found = gpu.worker.wait_tokens(step - 1)
            assert found is not None
            assert found.tokens == [step - 1] * 3
    gpu.worker.wait_tokens(n_step)
    thread.join()
    assert not failures
    gpu.worker.settle()
    gpu.worker.check_integrity()
    gpu.check_slots()
    residents = [{(layer, e): s for e, s in gpu.worker.residents(layer).items()} for layer in range(N_LAYER)]
    table = [((layer, e), s) for layer, row in enumerate(gpu.table.tolist()) for e, s in enumerate(row) if s >= 0]
    assert {key: slot for layer in residents for key, slot in layer.items()} == dict(table)


@pytest.mark.parametrize(
    "last", ["tokens", "missed", "ahead", "ids", "weights", "slots", "ahead of", "x", "check", "x sum"]
)
def test_a_message_is_taken_when_all_of_it_is_there(last: str) -> None:
    """In whatever order its parts come behind the number."""
    gpu = FakeGpu()
    gpu.ahead = [np.ones((N_LAYER, 1, TOP_K), np.int64)]
    gpu.worker.expect(1, 1, True)
    box, record = gpu.mailbox, gpu.mailbox.messages[N_LAYER].numpy()
    box.x.normal_()
    ids, slots = np.array([[0, 1]]), np.full((1, TOP_K), -1, np.int32)
    gpu.post(1, 0, ids, np.ones((1, TOP_K), np.float32), slots, 2, publish=False)
    header = record[:64].view(np.int64)
    parts: dict[str, npt.NDArray[Any]] = {
        "tokens": header[1:2],
        "missed": header[2:3],
        "ahead": header[3:4],
        "ids": record[box.ids_offset :][:4],
        "weights": record[box.weights_offset :][4:8],
        "slots": record[box.slots_offset :][:4],
        "ahead of": record[box.ahead_offset :][4:8],
        "x": box.x[0, -1:].numpy(),
        "check": header[4:5],
        "x sum": box.x_checks[0, :1].numpy(),
    }
    whole = parts[last].copy()
    parts[last][:] += 1
    header[0] = gpu.seq(1, 0)
    time.sleep(0.01)
    assert not box.answer_numbers.any()
    parts[last][:] = whole
    flags, _, _ = gpu.answer(1, 0, 1)
    assert flags == 1
    expected = gpu.kernels.expert_ffn(gpu.handles[0], box.x[:1], torch.from_numpy(ids), torch.ones(1, TOP_K))
    assert torch.equal(box.y[:1], expected)
    gpu.worker.stop()


def test_what_the_cpu_computes_is_fetched_for_later_steps() -> None:
    gpu = FakeGpu("cpu", (12, 6), max_background=100)
    assert gpu.step(1, IDS) == [(0, 4, 0)] * N_LAYER
    gpu.worker.settle()
    assert gpu.step(2, IDS) == [(4, 0, 0)] * N_LAYER
    stats = gpu.worker.stats()
    n_expert = sum(len(np.unique(ids)) for ids in IDS)
    assert (stats.cpu_experts, stats.fetched_background, stats.fetched_used) == (n_expert, n_expert, n_expert)
    sizes = [layout.gate.nbytes + layout.up.nbytes + layout.down.nbytes for layout in LAYOUTS]
    expected = sum(len(np.unique(ids)) * size for ids, size in zip(IDS, sizes, strict=True))
    assert stats.copied_bytes == stats.cpu_bytes == expected
    assert stats.fetched_now == stats.fetched_unused == stats.copy_wait_ns == 0
    assert stats.cpu_ns > 0
    timeline = gpu.worker.timeline()
    assert timeline["seq"].tolist() == [gpu.seq(step, layer) for step in (1, 2) for layer in range(N_LAYER)]
    assert timeline["n_hit"].tolist() == [0] * N_LAYER + [4] * N_LAYER
    assert (timeline["answered"][:N_LAYER] > timeline["seen"][:N_LAYER]).all()
    assert (timeline["answered"][N_LAYER:] == 0).all()
    assert abs(timeline["seen"][-1] - time.monotonic_ns()) < 60e9
    gpu.worker.reset_stats()
    assert gpu.worker.stats().hits == [0] * N_LAYER
    assert len(gpu.worker.timeline()) == 0


@pytest.mark.parametrize(("copy", "most"), [(1.0, 1), (1e15, 2)])
def test_the_background_is_limited(copy: float, most: int) -> None:
    """Beyond the limit only one, behind a copy that should be over by now."""
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu("cpu", (12, 6), max_background=1, copies=engine, rates=Rates(cpu=1e9, copy=copy))
    for step in range(1, 4):
        gpu.step(step, IDS)
    assert gpu.worker.stats().fetched_background == most


@pytest.mark.parametrize(("cpu", "copy", "late"), [(1e3, 1e12, 4), (1e12, 1e3, 0)])
def test_auto_takes_the_faster_way(cpu: float, copy: float, late: int) -> None:
    gpu = FakeGpu("auto", (12, 6), rates=Rates(cpu, copy))
    hit, _, n_late = gpu.step(1, IDS)[0]
    assert (hit, n_late) == (0, late)


def test_auto_learns() -> None:
    gpu = FakeGpu("cpu", rates=Rates(cpu=1.0, copy=1.0), max_background=1)
    for step in range(1, 8):
        gpu.step(step, random_ids(np.random.default_rng(step), 1))
    rates = gpu.worker.stats().rates
    assert max(rates.cpu, rates.cpu_beside_copies) > 1e6
    assert max(rates.copy, rates.copy_beside_cpu) > 1e6


def test_bad_logits() -> None:
    gpu = FakeGpu()
    gpu.worker.expect(1, 2, True)
    gpu.layers(1, IDS)
    gpu.worker.expect(2, 2, True)
    for layer in range(N_LAYER):
        gpu.layer(2, layer, IDS[layer], True, np.random.default_rng(0))
    gpu.finish(2, [0, 0], bad=True)
    found = gpu.worker.wait_tokens(2)
    assert found is not None
    assert found.bad


def test_the_host_admits_while_no_step_is_pending() -> None:
    gpu = FakeGpu(n_slot=(2, 0), max_background=0)
    worker = gpu.worker
    for expert in (4, 5):
        place = worker.reserve(2, expert)
        assert place is not None
        assert place.evicted is None
        gpu.pools[2][place.slot] = IMAGES[2][expert]
        gpu.table[2, expert] = place.slot
        worker.complete(2, expert)
    assert worker.residents(2) == {4: worker.slot_of(2, 4), 5: worker.slot_of(2, 5)}
    before = np.zeros((N_LAYER, N_EXPERT), np.float32)
    before[2, 4] = 2.5
    worker.seed(before)
    np.testing.assert_array_equal(worker.use_counts(), before)
    assert worker.reserve(0, 1, evict=False) is None
    place = worker.reserve(0, 1)
    assert place is not None
    assert place.evicted == (2, 5)
    worker.cancel(0, 1)
    gpu.table[2, 5] = -1
    assert worker.reserve(1, 0) is None
    worker.expect(1, 1, True)
    with pytest.raises(RuntimeError, match="step 1 is pending"):
        worker.residents(2)
    ids = np.full((N_LAYER, 1, TOP_K), [0, 4])
    assert gpu.layers(1, ids)[2] == (1, 1, 0)
    assert worker.wait_tokens(1) is not None
    worker.settle()
    worker.release(2, 4)
    assert worker.slot_of(2, 4) == -1
    worker.check_integrity()


@pytest.mark.parametrize(("top_k", "max_batch"), [(1, 1), (2, 3), (6, 16), (8, 17)])
def test_regions(top_k: int, max_batch: int) -> None:
    box = Mailbox.allocate(2, 7, top_k, 64, max_batch, pinned=False)
    box.native()  # compares the sizes
    assert box.slots_offset + 4 * max_batch * top_k <= box.message_bytes
    assert box.message_bytes % 64 == box.late_offset % 64 == box.evicted_offset % 64 == box.token_bytes % 64 == 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_slots_and_table_on_the_device(mode: Mode) -> None:
    gpu = FakeGpu(mode, (N_EXPERT, N_EXPERT), device="cuda")
    for step in range(1, 20):
        gpu.step(step, random_ids(np.random.default_rng(step), 2))
    assert gpu.worker.stats().copied_bytes > 0


def test_copies_are_timed_one_after_the_other() -> None:
    gpu, rng = FakeGpu("fetch", (3, 3)), np.random.default_rng(0)
    before = time.monotonic_ns()
    for step in range(1, 6):
        gpu.step(step, random_ids(rng, 1))
    gpu.worker.settle()
    found, stats = gpu.worker.copies(), gpu.worker.stats()
    assert len(found) == stats.fetched_now + stats.fetched_background > 0
    assert before <= found["begun"][0]
    assert (found["begun"] <= found["ended"]).all()
    assert (found["ended"][:-1] <= found["begun"][1:]).all()
    assert found["ended"][-1] <= time.monotonic_ns()
    resident = {(layer, expert) for layer in range(N_LAYER) for expert in gpu.worker.residents(layer)}
    assert resident <= {(int(copy["layer"]), int(copy["expert"])) for copy in found}
    gpu.worker.reset_stats()
    assert len(gpu.worker.copies()) == 0
    gpu.worker.stop()


def test_a_slow_link_is_waited_for_or_left_alone() -> None:
    """Steps are right with it, and what "auto" chooses to copy depends on it."""
    rng = np.random.default_rng(3)
    for mode in MODES:
        gpu = FakeGpu(mode, (4, 4), copy_rate=50e6)
        for step in range(1, 5):
            gpu.step(step, random_ids(rng, 1))
        gpu.worker.settle()
        copied, stats = gpu.worker.copies(), gpu.worker.stats()
        seconds = (copied["ended"] - copied["begun"]).sum() * 1e-9
        assert seconds >= 0.99 * stats.copied_bytes / 50e6 > 0
        gpu.worker.stop()


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfu-decay:half_life=3", "blend"])
def test_hits_are_the_simulators(policy: str) -> None:
    """Where every miss is fetched, however long the copies take and in whatever order they are made."""
    spec, n_slot = policy_of(policy), (7, 3)
    gpu, rng = FakeGpu("fetch", n_slot, policy=spec), np.random.default_rng(2)
    ids = np.stack([random_ids(rng, 1) for _ in range(40)])  # [n_step, N_LAYER, 1, TOP_K]
    for step, chosen in enumerate(ids, 1):
        gpu.step(step, chosen)
    pools = [SlotPool(SEPARATE, [0, 2], gpu.pools[0]), SlotPool(PACKED, [1], gpu.pools[1])]
    hits = simulated_hits(pools, [{}] * N_LAYER, spec, ids[:, :, 0].astype(np.int32), N_EXPERT)
    assert gpu.worker.stats().hits == hits.sum(axis=0).tolist()
    assert (hits.mean(axis=0) > 0).all()
    assert (hits.mean(axis=0) < TOP_K).all()


@pytest.mark.parametrize(
    ("cpu", "beside", "copy", "price"),
    [(100e9, 60e9, 50e9, 0.8), (100e9, 20e9, 50e9, 0.99), (100e9, 110e9, 50e9, 0.0)],
)
def test_a_copy_costs_the_misses_that_the_cpu_could_have_computed(
    cpu: float, beside: float, copy: float, price: float
) -> None:
    """A copy of a gigabyte at 50 GB/s takes 20 ms, in which the CPU reads 1.2 of 2 GB: it loses 0.8."""
    assert _cpu.Rates(cpu, beside, 60e9, copy, 0, 0).price_of_copy == pytest.approx(price)


@pytest.mark.parametrize(("cpu", "beside", "pays"), [(1.0, 1e30, True), (1e30, 1.0, False)])
def test_an_expert_takes_no_place_for_less_than_a_copy_costs(cpu: float, beside: float, pays: bool) -> None:
    """All slots hold experts that were used before; then others are used, hardly more than those lately."""
    rates = Rates(cpu=cpu, copy=1.0, cpu_beside_copies=beside)
    policy = policy_of("lfu-decay:half_life=0.25")  # a step later a use counts a sixteenth
    gpu = FakeGpu("cpu", (4, 2), rates=rates, policy=policy, max_background=2)
    first, second = (np.tile(np.array(ids), (N_LAYER, 1, 1)) for ids in ([[0, 1]], [[2, 3]]))
    for step in range(1, 5):
        gpu.step(step, first)
        gpu.worker.settle()
    filled = gpu.worker.stats().fetched_background
    assert filled == 2 * N_LAYER
    gpu.step(5, second)
    assert (gpu.worker.stats().fetched_background > filled) == pays
