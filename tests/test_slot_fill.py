"""Slots that the decode worker fills in the background: in which order, what steps see of it, and how it ends."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from fake_gpu import LAYOUTS, MAX_BATCH, N_EXPERT, N_LAYER, PACKED, TOP_K, FakeGpu, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine import DecodeError, Engine
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.kernels import _cpu
from moe_engine.kernels.worker import DecodeWorker, Mode, Rates
from moe_engine.profile import Profile

KEYS = [(layer, expert) for layer in range(N_LAYER) for expert in range(N_EXPERT)]
MODES: list[Mode] = ["cpu", "fetch", "auto", "exact"]
ALL = 10_000  # copies
IDS = random_ids(np.random.default_rng(0), 1)


def shuffled(seed: int) -> list[tuple[int, int]]:
    return [KEYS[i] for i in np.random.default_rng(seed).permutation(len(KEYS))]


def that_fit(order: list[tuple[int, int]], n_slot: tuple[int, int]) -> list[tuple[int, int]]:
    room, found = list(n_slot), []
    for layer, expert in order:
        pool = int(LAYOUTS[layer] is PACKED)
        if room[pool] > 0:
            room[pool] -= 1
            found.append((layer, expert))
    return found


def in_table(gpu: FakeGpu) -> dict[tuple[int, int], int]:
    """Slots by key, of the table; the worker says the same."""
    table = {(layer, e): int(gpu.table[layer, e]) for layer, e in (gpu.table >= 0).nonzero().tolist()}
    residents = [gpu.worker.residents(layer) for layer in range(N_LAYER)]
    assert table == {(layer, e): slot for layer, of in enumerate(residents) for e, slot in of.items()}
    return table


@pytest.mark.parametrize("fill_bytes", [1, 1 << 20])
@pytest.mark.parametrize("n_slot", [(5, 2), (0, 4), (12, 6), (40, 40)])
def test_the_best_come_first_until_no_slot_is_free(n_slot: tuple[int, int], fill_bytes: int) -> None:
    gpu, order = FakeGpu(n_slot=n_slot, fill_bytes=fill_bytes), shuffled(1)
    gpu.worker.fill([*order, *KEYS])  # every one twice
    gpu.worker.settle()
    gpu.worker.check_integrity()
    gpu.check_slots()
    copied = gpu.worker.copies()
    assert list(zip(copied["layer"].tolist(), copied["expert"].tolist(), strict=True)) == that_fit(order, n_slot)
    assert in_table(gpu).keys() == set(that_fit(order, n_slot))
    stats = gpu.worker.stats()
    assert stats.fetched_now == stats.fetched_background == stats.fetched_used == 0
    gpu.worker.fill(KEYS)
    gpu.worker.settle()  # nothing is left to be done


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_token=st.integers(1, MAX_BATCH),
    spare=st.tuples(st.integers(-N_EXPERT, 6), st.integers(-N_EXPERT, 6)),
    releases=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    fill_bytes=st.sampled_from([1, 300_000, 1 << 30]),
    allow_late=st.booleans(),
)
def test_steps_while_slots_are_filled(
    mode: Mode,
    seed: int,
    n_token: int,
    spare: tuple[int, int],
    releases: list[int],
    fill_bytes: int,
    allow_late: bool,
) -> None:
    """Copies end when hypothesis says so. Every step checks bytes behind the table, answers and books."""
    exact = mode == "exact"
    engine = _cpu.HostCopyEngine(held=True)
    least = min(N_EXPERT, n_token * TOP_K)
    n_slot = least + abs(spare[0]) if exact else N_EXPERT + spare[0], least + abs(spare[1]) if exact else spare[1] + 6
    gpu = FakeGpu(
        mode,
        n_slot,
        copies=engine,
        rates=Rates(cpu=1e9, copy=1e9, cpu_fixed=0, copy_fixed=0),
        meanwhile=lambda: engine.release(1),
        fill_bytes=fill_bytes,
    )
    rng = np.random.default_rng(seed)
    gpu.worker.fill(shuffled(seed))
    gpu.worker.check_integrity()
    for step, release in enumerate(releases, 1):
        engine.release(release)
        gpu.ahead = [random_ids(rng, n_token) for _ in range(step % 3)]
        gpu.step(step, random_ids(rng, n_token), allow_late or exact)
    engine.release(ALL)
    gpu.worker.settle()
    gpu.worker.check_integrity()
    gpu.check_slots()
    table = in_table(gpu)
    for pool, n, total in ((0, n_slot[0], 2 * N_EXPERT), (1, n_slot[1], N_EXPERT)):
        assert sum(int(LAYOUTS[layer] is PACKED) == pool for layer, _ in table) == min(n, total)
    gpu.worker.stop()


def test_in_a_step_one_is_filled_where_nothing_else_is_copied() -> None:
    """Not beside another copy, nor beside what is fetched behind an answer."""
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu("cpu", (12, 6), copies=engine, fill_bytes=1, max_background=1)
    hits = [(0, 0), (0, 1), (1, 0), (1, 1)]
    gpu.worker.fill([*hits, *((2, expert) for expert in range(N_EXPERT))])
    engine.release(len(hits))
    until(lambda: len(gpu.worker.copies()) == len(hits))  # (2, 0) is in flight
    gpu.worker.expect(1, 1, True)
    rng = np.random.default_rng(0)
    assert gpu.layer(1, 0, np.array([[0, 1]]), True, rng) == (2, 0, 0)  # nothing more begins: one is in flight
    until(lambda: len(gpu.worker.timeline()) == 1)  # seen while that was so
    engine.release(1)
    until(lambda: len(gpu.worker.copies()) == len(hits) + 1)
    assert gpu.layer(1, 1, np.array([[0, 1]]), True, rng) == (2, 0, 0)  # (2, 1) begins
    until(lambda: len(gpu.worker.timeline()) == 2)
    engine.release(1)
    until(lambda: len(gpu.worker.copies()) == len(hits) + 2)
    assert gpu.layer(1, 2, np.array([[1, 5]]), True, rng) == (1, 1, 0)  # 5 is fetched, and 2 is not filled yet
    engine.release(1)
    until(lambda: len(gpu.worker.copies()) == len(hits) + 3)
    gpu.finish(1, [1])
    assert gpu.worker.wait_tokens(1) is not None
    engine.release(ALL)
    gpu.worker.settle()
    copied = gpu.worker.copies()
    assert copied["expert"][len(hits) :].tolist() == [0, 1, 5, 2, 3, 4]
    stats = gpu.worker.stats()
    assert (stats.fetched_background, stats.fetched_used) == (1, 0)
    gpu.worker.check_integrity()


def until(condition: Callable[[], bool]) -> None:
    """Other threads get there by themselves."""
    pause, turns = threading.Event(), 0
    while not condition():
        pause.wait(0.001)
        turns += 1
        assert turns < 20_000, "never"


def test_what_is_filled_first_is_evicted_last() -> None:
    """As if it had been used last of what is filled."""
    gpu = FakeGpu("fetch", (4, 0), max_background=0)
    gpu.worker.fill([(0, 3), (0, 1), (2, 0), (0, 5)])
    gpu.worker.settle()
    gpu.step(1, np.array([[[2, 4]], [[-1, -1]], [[-1, -1]]]))
    gpu.worker.settle()
    assert in_table(gpu).keys() == {(0, 3), (0, 1), (0, 2), (0, 4)}


def test_the_list_is_checked_and_needs_an_idle_worker() -> None:
    gpu = FakeGpu()
    with pytest.raises(RuntimeError, match=f"no expert {N_EXPERT} of layer 0"):
        gpu.worker.fill([(0, 0), (0, N_EXPERT)])
    gpu.worker.settle()
    assert in_table(gpu) == {}
    gpu.worker.expect(1, 1, True)
    with pytest.raises(RuntimeError, match="step 1 is pending"):
        gpu.worker.fill(KEYS)


@pytest.mark.parametrize("fill_bytes", [1, 1 << 30])
def test_stopping_ends_it(fill_bytes: int) -> None:
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu(n_slot=(12, 6), copies=engine, fill_bytes=fill_bytes)
    gpu.worker.fill(KEYS)
    engine.release(3)
    until(lambda: len(gpu.worker.copies()) == 3)
    gpu.worker.stop()
    gpu.check_slots()
    assert int((gpu.table >= 0).sum()) == 3
    with pytest.raises(RuntimeError, match="stopped"):
        gpu.worker.settle()


def test_settling_takes_its_time_unless_nothing_moves() -> None:
    engine = _cpu.HostCopyEngine(held=True)
    gpu = FakeGpu(n_slot=(12, 6), copies=engine, stall_seconds=0.1, fill_bytes=1)
    gpu.worker.fill(KEYS)
    engine.release(2)
    until(lambda: len(gpu.worker.copies()) == 2)
    with pytest.raises(RuntimeError, match="16 experts are on their way, but none has arrived"):
        gpu.worker.settle()


# -- the engine


N_MODEL_LAYER = 2
SMALL = {"num_hidden_layers": N_MODEL_LAYER, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen3moe/plain", tmp_path_factory.mktemp("model"), "F16", **SMALL).path


class Held:
    """Engines whose copies into slots wait for `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.copies: list[_cpu.HostCopyEngine] = []

        def worker(*parts: Any, **others: Any) -> DecodeWorker:
            self.copies.append(_cpu.HostCopyEngine(held=True))
            return DecodeWorker(*parts, **(others | options), copies=self.copies[-1])

        monkeypatch.setattr("moe_engine.graph_decoder.DecodeWorker", worker)

    def release(self, n: int = ALL) -> None:
        self.copies[-1].release(n)


def load(path: Path, **options: Any) -> Engine:
    common: dict[str, Any] = {"device": "simulated", "ctx": 32, "threads": 2, "vram_budget": "64MiB"}
    return Engine.load(path, **(common | options))


def graph_decoder(engine: Engine) -> GraphDecoder:
    assert isinstance(engine.decoder, GraphDecoder)
    return engine.decoder


def table_of(engine: Engine) -> torch.Tensor:
    return graph_decoder(engine).step.experts.slot_table


def greedy(engine: Engine) -> list[int]:
    return engine.generate(PROMPT, temperature=0, max_tokens=3).tokens


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    with load(model, eager=True, profile=False) as engine:
        return greedy(engine)


def some_profile(path: Path) -> Profile:
    """The last experts are the best."""
    with load(path, device="cpu") as engine:
        model, n_expert = engine.fingerprint, engine.model.router.n_expert
    counts = np.tile(np.arange(n_expert, dtype=np.float32), (N_MODEL_LAYER, 1))
    return Profile(model, counts, np.zeros(counts.shape, bool))


def test_loading_does_not_wait_and_what_has_not_arrived_is_a_miss(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, profile = Held(monkeypatch), some_profile(model)
    profile.save()
    with load(model, cache_slots=6, miss="cpu") as engine:
        worker = graph_decoder(engine).worker
        assert (table_of(engine) < 0).all()
        assert greedy(engine) == expected  # prompt and steps, with nothing but misses
        assert sum(worker.stats().hits) == 0
        worker.check_integrity()
        held.release(3)
        until(lambda: len(resident(engine)) == 3)
        assert resident(engine) == set(profile.best_first()[:3])
        assert greedy(engine) == expected
        held.release()
        worker.settle()
        worker.check_integrity()
        assert resident(engine) == set(profile.best_first()[:6])
        assert greedy(engine) == expected


def resident(engine: Engine) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, expert in (table_of(engine) >= 0).nonzero().tolist()}


@pytest.mark.parametrize("options", [{"cache_slots": 4, "exact": True}, {"cache_slots": 4, "miss": "fetch"}, {}])
def test_tokens_are_those_without_a_profile(
    model: Path, expected: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a link so slow that the fill goes on meanwhile."""
    some_profile(model).save()
    monkeypatch.setattr(
        "moe_engine.graph_decoder.DecodeWorker", lambda *parts, **others: DecodeWorker(*parts, **others, copy_rate=5e5)
    )
    with load(model, **options) as engine:
        assert greedy(engine) == expected
        graph_decoder(engine).worker.settle()
        graph_decoder(engine).worker.check_integrity()
        assert greedy(engine) == expected


@pytest.mark.parametrize("use", [greedy, lambda engine: engine.forward(PROMPT)])
def test_where_nothing_may_miss_the_first_use_waits(
    model: Path, use: Callable[[Engine], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(model) as engine:
        assert graph_decoder(engine).misses == ("none",)
        found = use(engine)
    held = Held(monkeypatch, stall_seconds=1.0)
    with load(model) as engine:
        assert (table_of(engine) < 0).all()
        with pytest.raises(DecodeError, match="none has arrived"):
            use(engine)
        held.release()
        again = use(engine)
        assert (table_of(engine) >= 0).all()
    assert torch.equal(torch.as_tensor(again), torch.as_tensor(found))


def test_placed_layers_are_there_at_once(model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    Held(monkeypatch)
    with load(model, place=(r"blk\.0\..*_exps=cuda:0",), cache_slots=4, miss="cpu") as engine:
        assert (table_of(engine)[0] >= 0).all()
        assert (table_of(engine)[1] < 0).all()
        assert greedy(engine) == expected


def test_closing_in_the_middle(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    engine = load(model, cache_slots=6)
    held.release(2)
    until(lambda: len(resident(engine)) == 2)
    worker = graph_decoder(engine).worker
    engine.close()
    with pytest.raises(RuntimeError, match="stopped"):
        worker.settle()
