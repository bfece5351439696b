"""Models whose experts are in RAM, all or some: the tokens are those of the mapped file, whatever is read when."""

import gc
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_engine import CapacityError, ConfigError, Engine, ModelFormatError
from moe_engine.budget import host_bytes
from moe_engine.config import EngineConfig
from moe_engine.expert_store import ExpertStore
from moe_engine.gguf_file import GGUFFile
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.metadata import Metadata
from moe_engine.models import model_class
from moe_engine.page_lock import PageLocker
from moe_engine.planner import plan
from moe_engine.ram_plan import RamPlan, plan_ram

PAGE = os.sysconf("SC_PAGESIZE")
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # interpreted kernels are slow


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen3moe/plain", tmp_path_factory.mktemp("model"), "F16", **SMALL).path


def load(path: Path | None, **options: Any) -> Engine:
    return Engine.load(path, **({"ctx": 32, "threads": 2} | options))


def store_of(engine: Engine) -> ExpertStore:
    store = engine.experts.store  # type: ignore[attr-defined]
    assert isinstance(store, ExpertStore)
    return store


def room_for(n: int) -> Callable[..., RamPlan]:
    """The plan of a machine whose RAM holds `n` experts."""

    def plan(file: GGUFFile, *rest: Any, **options: Any) -> RamPlan:
        whole = plan_ram(file, *rest, **options)
        expert = file.tensors["blk.1.ffn_gate_exps.weight"]
        nbytes = 3 * expert.nbytes // expert.shape[0] + 1
        return replace(whole, limit=n * (-(-nbytes // PAGE) + 1) * PAGE)

    return plan


MODES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "eager": {"device": "simulated", "eager": True},
    "worker, misses on the CPU": {"device": "simulated", "miss": "cpu", "cache_slots": 4},
    "worker, misses fetched": {"device": "simulated", "exact": True, "cache_slots": 4},
}


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, list[int]]:
    """Tokens with all experts in RAM, by device."""
    tokens = {}
    for device in ("cpu", "simulated"):
        with load(path, device=device, eager=True) as engine:
            assert store_of(engine).ram.holds_all
            tokens[device] = engine.generate(PROMPT, temperature=0, max_tokens=3).tokens
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_tokens_do_not_depend_on_how_many_experts_are_in_ram(
    path: Path, expected: dict[str, list[int]], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_engine.loading.plan_ram", room_for(6))
    options = MODES[mode]
    with load(path, **options) as engine:
        if mode.startswith("worker"):
            assert isinstance(engine.decoder, GraphDecoder)
        tokens = engine.generate(PROMPT, temperature=0, max_tokens=3).tokens
        if isinstance(engine.decoder, GraphDecoder):
            engine.decoder.worker.settle()
        store = store_of(engine)
        store.memory.check_integrity()
        counts = store.memory.counts()
        assert tokens == expected[options["device"]]
    assert store.ram.limit is not None
    assert counts.most_resident_bytes <= store.ram.limit
    assert counts.n_dropped > 0
    assert counts.n_held == 0


def test_a_budget_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(None, device="cpu") as engine:
        expected = engine.generate("Once upon", temperature=0, max_tokens=8).tokens
        plan = store_of(engine).ram
    budget, besides = 8 << 30, 12345
    taken = budget // 8 * 7 - besides - plan.dense - plan.routed * 3 // 4  # an eighth is kept
    monkeypatch.setattr("moe_engine.loading.host_bytes", lambda *arguments: besides)
    monkeypatch.setattr("moe_engine.ram_plan.process_bytes", lambda: taken)
    with load(None, device="cpu", ram_budget=budget) as engine:
        ram = store_of(engine).ram
        assert (ram.limit, ram.process, ram.holds_all) == (plan.routed * 3 // 4, budget // 8 * 7, False)
        assert engine.generate("Once upon", temperature=0, max_tokens=8).tokens == expected
    monkeypatch.setattr("moe_engine.ram_plan.process_bytes", lambda: taken - plan.routed)
    with load(None, device="cpu", ram_budget="8GiB") as engine:
        assert store_of(engine).ram.holds_all


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_no_room_for_a_step(path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_engine.ram_plan.process_bytes", lambda: 1 << 30)
    refusals = []
    for call in (load, plan):
        with pytest.raises(
            CapacityError, match=r"ram_budget is 1\.0 MiB.*one step's experts need.*What would"
        ) as refused:
            call(path, device=device, ctx=32, ram_budget="1MiB")
        refusals.append(str(refused.value))
    assert refusals[0] == refusals[1]  # loading and planning say the same
    budget = int(refusals[0].partition("ram_budget ")[2].rpartition("ram_budget ")[2].removesuffix("MiB"))
    with load(path, device=device, ram_budget=f"{budget}MiB"):
        pass
    with pytest.raises(CapacityError):
        load(path, device=device, ram_budget=f"{budget - 2}MiB")
    with pytest.raises(ConfigError, match="lots"):
        load(path, device=device, ram_budget="lots")


def test_what_a_process_takes_while_it_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be foreseen, such as libraries of a GPU."""
    taken = iter([1 << 30, 3 << 30] * 2)  # before and after each of two loads
    monkeypatch.setattr("moe_engine.ram_plan.process_bytes", lambda: next(taken))
    with pytest.raises(CapacityError, match=r"2\.00 GiB, but once the model is loaded.*What would do") as refused:
        load(path, device="cpu", ram_budget="2GiB")
    enough = str(refused.value).rpartition("ram_budget ")[2]
    with load(path, device="cpu", ram_budget=enough):
        pass


def test_the_cache_of_keys_and_values_is_foreseen(path: Path) -> None:
    def foreseen(**options: Any) -> int:
        file, config = GGUFFile(path), EngineConfig.of(**options)
        meta = Metadata(file.metadata, file.architecture, "test")
        return host_bytes(file, meta, model_class(file.architecture, "test"), config, 32, torch.device("cpu"), None)

    with load(path, device="cpu") as engine:
        assert foreseen(n_sequence=3) - foreseen(n_sequence=1) == 2 * 32 * engine.cache.token_bytes


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_no_memory_for_a_step(path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"device": device, "ctx": 32, "n_sequence": 8}
    monkeypatch.setattr("moe_engine.ram_plan.available_ram_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"of RAM are available.*one step's experts need.*What would do") as refused:
        plan(path, **options)
    enough = int(str(refused.value).partition("What would do: ")[2].partition("MiB")[0]) << 20
    monkeypatch.setattr("moe_engine.ram_plan.available_ram_bytes", lambda: enough)
    assert plan(path, **options).on_disk >= 0
    monkeypatch.setattr("moe_engine.ram_plan.available_ram_bytes", lambda: enough - (1 << 20))
    with pytest.raises(CapacityError):
        plan(path, **options)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_progress_ends_with_all_bytes(path: Path, device: str) -> None:
    reports: list[tuple[int, int]] = []
    with load(path, device=device, eager=True, progress=lambda done, total: reports.append((done, total))):
        pass
    done, total = reports[-1]
    assert reports == sorted(reports)
    assert 0.9 * path.stat().st_size < done == total <= path.stat().st_size


def test_a_file_that_becomes_shorter(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "short.gguf"
    copy.write_bytes(path.read_bytes())
    file = GGUFFile(copy)
    stacks = [file.tensor(f"blk.1.ffn_{part}_exps.weight") for part in ("gate", "up", "down")]
    with copy.open("r+b") as opened:
        opened.truncate(file.tensors["blk.1.ffn_gate_exps.weight"].offset)
    store = ExpertStore(file, RamPlan(0, 0, None, 0, 0), stacks[0].shape[0], CpuKernels(1), torch.device("cpu"))
    store.register(1, *stacks)
    with pytest.raises(ModelFormatError, match=r"short\.gguf.*shorter"):
        store.finish(lambda: None)
    store.close()


def n_thread() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_loading_can_be_interrupted(path: Path, device: str) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with load(path, device=device, eager=True):
        pass
    gc.collect()
    before = n_thread()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            load(path, device=device, eager=True, progress=interrupt)
    gc.collect()
    assert n_thread() <= before


class FakeDriver:
    """Locks up to `n_ok` pieces, then refuses."""

    def __init__(self, n_ok: int, enters: int = 0) -> None:
        self.n_ok, self.enters = n_ok, enters
        self.locked: dict[int, int] = {}
        self.most = 0
        self.threads: set[int] = set()

    def enter(self) -> int:
        self.threads.add(threading.get_ident())
        return self.enters

    def lock(self, address: int, nbytes: int) -> int:
        if len(self.locked) == self.n_ok:
            return 304
        overlaps = [
            a for a, n in self.locked.items() if a // PAGE <= (address + nbytes - 1) // PAGE and address < a + n
        ]
        assert not overlaps
        self.locked[address] = nbytes
        self.most = len(self.locked)
        return 0

    def unlock(self, address: int) -> None:
        del self.locked[address]

    def leave(self) -> None:
        self.threads.add(threading.get_ident())


@pytest.fixture(scope="module")
def bundled_store() -> Callable[..., tuple[ExpertStore, list[torch.Tensor]]]:
    """A store of the bundled model's experts, and what its slots should be."""
    with load(None, device="cpu") as engine:
        path = engine.file.path

    def make(driver: FakeDriver) -> tuple[ExpertStore, list[torch.Tensor]]:
        file = GGUFFile(path)
        names = sorted(name.removesuffix("ffn_gate_exps.weight") for name in file.tensors if "ffn_gate_exps" in name)
        stacks = [[file.tensor(f"{name}ffn_{part}_exps.weight") for part in ("gate", "up", "down")] for name in names]
        ram = RamPlan(0, 0, None, 0, 0)
        store = ExpertStore(file, ram, stacks[0][0].shape[0], CpuKernels(2), torch.device("cpu"), driver=driver)
        slots = []
        for gate, up, down in stacks:
            handle = store.register(0, gate, up, down)
            for part, stack in zip((handle.gate, handle.up, handle.down), (gate, up, down), strict=True):
                assert part.shape == stack.shape
            slots.append((handle, (gate, up, down)))
        store.finish(lambda: None)
        for handle, whole_parts in slots:
            for part, whole in zip((handle.gate, handle.up, handle.down), whole_parts, strict=True):
                assert torch.equal(part.data, whole.data)
        return store, [layer.rows for layer in store._layers]

    return make


def wait_until(condition: Callable[[], bool]) -> None:
    event = threading.Event()
    for _ in range(500):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("it has not happened in five seconds")


@pytest.mark.parametrize("at_once", [1 << 30, 1])
@pytest.mark.parametrize("n_ok", [0, 1, 1000])
def test_copies_while_and_without_page_locking(
    bundled_store: Callable[..., tuple[ExpertStore, list[torch.Tensor]]],
    n_ok: int,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("moe_engine.page_lock.LOCK_BYTES", at_once)
    monkeypatch.setattr("moe_engine.page_lock.RING_BYTES", 10_007)  # an expert takes several
    driver = FakeDriver(n_ok)
    with caplog.at_level(logging.WARNING):
        store, rows = bundled_store(driver)
        locker = store._locker
        assert locker is not None
        n_expert = len(rows[0])
        wait_until(lambda: "refuses" in caplog.text or min(map(locker.n_locked, range(len(rows)))) == n_expert)
    assert ("304" in caplog.text) == (n_ok < 1000)
    for index, whole in enumerate(rows):
        slots = torch.zeros_like(whole)
        store.copy(index, list(range(n_expert)), slots)
        assert torch.equal(slots, whole)
        some = [1, 2, n_expert - 1]
        store.copy(index, some, slots[:3])
        assert torch.equal(slots[:3], whole[some])
    assert driver.most == min(n_ok, driver.most)
    store.close()
    store.close()
    assert not driver.locked
    assert len(driver.threads) == 1


def test_no_driver_is_a_refusal(
    bundled_store: Callable[..., tuple[ExpertStore, list[torch.Tensor]]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        store, _ = bundled_store(FakeDriver(5, enters=100))
        wait_until(lambda: "CUDA error 100" in caplog.text)
    store.close()


@pytest.mark.parametrize("row_bytes", [PAGE, PAGE + 16])
def test_locked_pieces_share_no_page(row_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_engine.page_lock.LOCK_BYTES", 3 * PAGE)
    memory = torch.zeros(12 * row_bytes + PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    rows = memory[start : start + 10 * row_bytes].view(10, row_bytes)
    driver, ready = FakeDriver(1000), threading.Event()
    locker = PageLocker(driver, lambda index: ready.is_set(), lambda error: None)
    locker.add(rows)
    assert locker.n_locked(0) == 0
    ready.set()
    wait_until(lambda: locker.n_locked(0) == 10)
    assert driver.most == (4 if row_bytes == PAGE else 1)
    assert locker.rows_at_once(rows) == (3 if driver.most == 4 else 10)
    locker.close()
    assert not driver.locked


@given(rows=st.sets(st.integers(0, 30), min_size=1), at_once=st.integers(1, 12))
def test_neighbours_are_copied_together_within_a_piece(rows: set[int], at_once: int) -> None:
    source, some = torch.randint(0, 256, (31, 8), dtype=torch.uint8), sorted(rows)
    target = torch.zeros(len(some), 8, dtype=torch.uint8)
    n_copy = _cpu.copy_rows(target.data_ptr(), source.data_ptr(), 8, some, at_once, None)
    assert torch.equal(target, source[some])
    assert n_copy == 1 + sum(b != a + 1 or b % at_once == 0 for a, b in pairwise(some))


def test_closing_does_not_wait_for_what_is_not_ready() -> None:
    driver = FakeDriver(1000)
    locker = PageLocker(driver, lambda index: False, lambda error: None)
    locker.add(torch.zeros(4, PAGE, dtype=torch.uint8))
    locker.close()
    assert (driver.most, len(driver.threads)) == (0, 1)
