"""Experts read from files when they are needed: whatever else is read and forgotten, one that is held has its bytes."""

import ctypes
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_blocks import random_blocks

from moe_engine.errors import CapacityError, ModelFormatError
from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME

PAGE = os.sysconf("SC_PAGESIZE")
N_EXPERT = 6
# Per layer, of an expert's parts: bytes, and their place in a slot. Neighbours share pages; one is larger than a chunk.
LAYERS = [((5000, 1200), (0, 5008), 6224), ((30000, 17), (0, 30000), 30032), ((100, 50), (0, 112), 176)]
CHUNK = 8192


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts of all layers, expert after expert, from an odd offset on."""
    path = tmp_path_factory.mktemp("experts") / "model.bin"
    n_byte = 37 + sum(N_EXPERT * sum(sizes) for sizes, _, _ in LAYERS)
    path.write_bytes(np.random.default_rng(0).integers(0, 256, n_byte, dtype=np.uint8).tobytes())
    return path


def forget(path: Path) -> None:
    """The system's cache of a file: what is read next comes from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Store:
    """An ExpertMemory over `path`, and what its experts should be."""

    def __init__(self, path: Path, limit: int = -1, direct: bool = True) -> None:
        self.memory = _cpu.ExpertMemory(N_EXPERT, limit, 0, 0, 3, CHUNK, direct)
        assert self.memory.add_file(str(path)) == 0
        data, offset = np.fromfile(path, np.uint8), 37
        self.rows: list[torch.Tensor] = []
        self.expected = []
        for sizes, places, slot_bytes in LAYERS:
            parts, slots = [], np.zeros((N_EXPERT, slot_bytes), np.uint8)
            for size, place in zip(sizes, places, strict=True):
                parts.append((0, offset, size, size, place))
                whole = np.zeros(N_EXPERT * size, np.uint8)  # the file may be shorter
                found = data[offset : offset + N_EXPERT * size]
                whole[: len(found)] = found
                slots[:, place : place + size] = whole.reshape(N_EXPERT, size)
                offset += N_EXPERT * size
            layer = self.memory.add_layer(slot_bytes, parts)
            self.rows.append(self.memory.region(layer, N_EXPERT * slot_bytes).view(N_EXPERT, slot_bytes))
            self.expected.append(torch.from_numpy(slots))
        self.memory.preload()

    def load(self) -> None:
        while not self.memory.wait(5):
            pass

    def check(self, layer: int, expert: int) -> None:
        assert torch.equal(self.rows[layer][expert], self.expected[layer][expert])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cold", [True, False])
def test_all_is_read_once(path: Path, direct: bool, cold: bool) -> None:
    if cold:
        forget(path)
    store = Store(path, direct=direct)
    store.load()
    for layer in range(len(LAYERS)):
        assert store.memory.is_read(layer)
        assert torch.equal(store.rows[layer], store.expected[layer])
    n_byte = path.stat().st_size - 37
    assert (store.memory.bytes_done(), store.memory.bytes_total()) == (n_byte, n_byte)
    assert store.memory.counts().n_read == len(LAYERS) * N_EXPERT
    store.memory.check_integrity()


def test_direct_reads_pass_the_cache_by(path: Path) -> None:
    def cached_pages() -> int:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            pages = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
            assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
            return sum(page & 1 for page in pages)

    expected = Store(path).expected  # from here on the file is cached
    forget(path)
    if cached_pages() or not opens_direct(path):
        pytest.skip("this file system keeps its cache, or has no direct reads")
    memory = _cpu.ExpertMemory(N_EXPERT, -1, 0, 0, 3, CHUNK)
    memory.add_file(str(path))
    sizes, places, slot_bytes = LAYERS[0]
    memory.add_layer(slot_bytes, [(0, 37, sizes[0], sizes[0], places[0])])
    while not memory.wait(5):
        pass
    rows = memory.region(0, N_EXPERT * slot_bytes).view(N_EXPERT, -1)
    assert torch.equal(rows[:, : sizes[0]], expected[0][:, : sizes[0]])
    assert cached_pages() == 0


def opens_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


LIMIT = 28 * PAGE  # half of all


@settings(max_examples=60)
@given(
    data=st.lists(
        st.tuples(
            st.sampled_from(["hold", "release", "prefetch"]),
            st.integers(0, len(LAYERS) - 1),
            st.sets(st.integers(0, N_EXPERT - 1), min_size=1, max_size=3),
        ),
        max_size=40,
    ),
    cold=st.booleans(),
)
def test_what_is_held_is_right_and_the_limit_is_kept(
    path: Path, data: list[tuple[str, int, set[int]]], cold: bool
) -> None:
    if cold:
        forget(path)
    store = Store(path, LIMIT)
    memory, held = store.memory, list[tuple[int, int]]()
    for what, layer, experts in data:
        ids = sorted(experts)
        if what == "hold":
            try:
                memory.hold(layer, ids)
                held += [(layer, expert) for expert in ids]
            except CapacityError:
                assert held, "nothing is in the way"
        elif what == "prefetch":
            memory.prefetch(layer, ids)
        else:
            for key in [key for key in held if key[0] == layer and key[1] in experts]:
                held.remove(key)
                memory.release(layer, [key[1]])
        for key in held:
            store.check(*key)
        counts = memory.counts()
        assert counts.most_resident_bytes <= LIMIT
        assert counts.n_held == len(set(held))
        memory.check_integrity()


def test_from_several_threads(path: Path) -> None:
    store = Store(path, LIMIT)
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(150):
                layer = int(rng.integers(len(LAYERS)))
                ids = rng.choice(N_EXPERT, 1 if layer == 1 else 2, replace=False).tolist()
                store.memory.prefetch(int(rng.integers(len(LAYERS))), [int(rng.integers(N_EXPERT))])
                try:
                    store.memory.hold(layer, ids)
                except CapacityError:  # the others hold, or read, too much
                    continue
                for expert in ids:
                    store.check(layer, expert)
                store.memory.release(layer, ids)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    store.memory.check_integrity()
    counts = store.memory.counts()
    assert counts.n_held == 0
    assert counts.n_dropped > 0
    assert counts.most_resident_bytes <= LIMIT


def test_memory_is_given_back(tmp_path: Path) -> None:
    """Resident pages of a region, as the system counts them."""
    size, n = 64 * PAGE, 16
    path = tmp_path / "large.bin"
    path.write_bytes(np.random.default_rng(1).integers(1, 256, n * size, dtype=np.uint8).tobytes())
    memory = _cpu.ExpertMemory(n, 4 * size, 0, 0, 2)
    memory.add_file(str(path))
    memory.add_layer(size, [(0, 0, size, size, 0)])
    memory.preload()
    while not memory.wait(5):
        pass
    address = memory.region(0, n * size).data_ptr()
    for expert in [*range(n), *range(n)]:
        memory.hold(0, [expert])
        memory.release(0, [expert])
        assert resident_bytes(address, n * size) <= 4 * size
    assert memory.counts().n_dropped >= 2 * n - 4
    assert resident_bytes(address, n * size) >= 3 * size


def resident_bytes(address: int, n_bytes: int) -> int:
    entries = Path("/proc/self/pagemap")
    with entries.open("rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        found = np.frombuffer(file.read(n_bytes // PAGE * 8), np.uint64)
    return int((found >> np.uint64(63)).sum()) * PAGE


def test_the_limit_follows_the_process(tmp_path: Path) -> None:
    size, n, budget = 256 * PAGE, 48, 32 * 256 * PAGE  # far more than a process changes by itself
    gc.collect()
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(n * size))
    now = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    memory = _cpu.ExpertMemory(n, budget, now + budget, 2 * size, 2)
    memory.add_file(str(path))
    memory.add_layer(size, [(0, 0, size, size, 0)])
    memory.preload()
    while not memory.wait(5):
        pass
    before = memory.counts()
    assert 2 * size < before.resident_bytes <= budget
    memory.hold(0, [0, 1, 2])
    taken = np.frombuffer(mmap.mmap(-1, 4 * budget), np.uint8)  # new pages: malloc may have some that are resident
    taken[:] = 1
    time.sleep(0.05)  # it looks now and then
    memory.hold(0, [n - 1])  # another caller, beside what cannot leave
    after = memory.counts()
    assert after.limit == 3 * (size + PAGE) + size
    assert after.resident_bytes == 4 * size < before.resident_bytes
    memory.release(0, [0, 1, 2, n - 1])
    time.sleep(0.05)
    memory.hold(0, [n - 2])
    assert memory.counts().limit == 2 * size
    assert memory.counts().resident_bytes <= 2 * size
    memory.check_integrity()
    assert taken.any()


def test_too_many_at_once(path: Path) -> None:
    store = Store(path, LIMIT)
    with pytest.raises(CapacityError, match=str(LIMIT)):
        store.memory.hold(1, list(range(N_EXPERT)))
    counts = store.memory.counts()
    assert counts.n_held == 0
    store.load()
    store.memory.check_integrity()
    store.memory.hold(1, [0])
    store.check(1, 0)


def use_all(store: Store) -> None:
    for layer in range(len(LAYERS)):
        for expert in range(N_EXPERT):
            store.memory.hold(layer, [expert])
            store.memory.release(layer, [expert])


def cut(path: Path, n_byte: int) -> None:
    with path.open("r+b") as file:
        file.truncate(n_byte)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_becomes_shorter(path: Path, tmp_path: Path, direct: bool) -> None:
    short = tmp_path / "short.bin"
    short.write_bytes(path.read_bytes())
    forget(short)
    cut(short, short.stat().st_size - 5000)
    at_load = Store(short, direct=direct)
    with pytest.raises(ModelFormatError, match=r"short\.bin.*shorter"):
        at_load.load()
    short.write_bytes(path.read_bytes())
    later = Store(short, LIMIT, direct)
    later.load()
    cut(short, 100)
    with pytest.raises(ModelFormatError, match=r"short\.bin.*shorter"):
        use_all(later)
    with pytest.raises(ModelFormatError, match=r"short\.bin"):
        later.memory.hold(0, [0])


def test_a_missing_file(tmp_path: Path) -> None:
    memory = _cpu.ExpertMemory(1, -1, 0, 0, 1)
    with pytest.raises(ModelFormatError, match="nothing"):
        memory.add_file(str(tmp_path / "nothing"))


def test_stop_ends_reading(path: Path) -> None:
    store = Store(path, LIMIT)
    store.memory.stop()
    with pytest.raises(RuntimeError, match="closed"):
        store.memory.hold(0, [0])
    store.memory.stop()


@pytest.mark.parametrize("use", [lambda memory: memory.hold(0, [N_EXPERT]), lambda memory: memory.hold(9, [0])])
def test_wrong_calls(path: Path, use: Callable[[_cpu.ExpertMemory], None]) -> None:
    with pytest.raises(RuntimeError, match="there is no expert"):
        use(Store(path, LIMIT).memory)


N_FILE_EXPERT, N_FF, HIDDEN = 8, 64, 256


class ExpertFile:
    """A file of experts, for CPU kernels, and what computes with them."""

    def __init__(self, folder: Path) -> None:
        types = [BY_NAME[name] for name in ("Q8_0", "Q8_0", "F16")]
        shapes = [(N_FF, HIDDEN), (N_FF, HIDDEN), (HIDDEN, N_FF)]
        self.cpu, self.rng = CpuKernels(2, float_activations=True), np.random.default_rng(2)
        self.weights = []
        for type, (n_out, n_in) in zip(types, shapes, strict=True):
            rows = random_blocks(type, N_FILE_EXPERT * n_out, n_in, self.rng)
            self.weights.append(QuantTensor(torch.from_numpy(rows).view(N_FILE_EXPERT, n_out, -1), type, n_in))
        self.path = folder / "experts.bin"
        self.path.write_bytes(b"".join(weight.data.numpy().tobytes() for weight in self.weights))
        self.slot_bytes = -(-sum(weight[0].nbytes for weight in self.weights) // PAGE) * PAGE

    def register(self, memory: _cpu.ExpertMemory) -> tuple[ExpertHandle, ExpertHandle]:
        """As experts that `memory` reads, and as plain tensors."""
        memory.add_file(str(self.path))
        sizes = [weight[0].nbytes for weight in self.weights]
        starts, places = [0, N_FILE_EXPERT * sizes[0], 2 * N_FILE_EXPERT * sizes[0]], [0, sizes[0], 2 * sizes[0]]
        memory.add_layer(self.slot_bytes, [(0, s, n, n, p) for s, n, p in zip(starts, sizes, places, strict=True)])
        region = memory.region(0, N_FILE_EXPERT * self.slot_bytes).view(N_FILE_EXPERT, self.slot_bytes)
        views = [
            QuantTensor(
                region[:, place : place + weight[0].nbytes].unflatten(1, (weight.n_out, -1)), weight.type, weight.n_in
            )
            for place, weight in zip(places, self.weights, strict=True)
        ]
        handle = self.cpu.register_experts(*views)
        handle.layer.read_from(memory, 0)
        return handle, self.cpu.register_experts(*self.weights)


def test_experts_are_computed_though_the_limit_shrinks(tmp_path: Path) -> None:
    """What fits at once by the limit of a moment ago may fit no more when it is held."""
    file = ExpertFile(tmp_path)
    gc.collect()
    now = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    room = 256 << 20  # far more than all experts, and than a process changes by itself
    memory = _cpu.ExpertMemory(N_FILE_EXPERT, room, now + room, 4 * (file.slot_bytes + PAGE), 2)
    handle, whole = file.register(memory)
    taken = torch.ones(2 * room, dtype=torch.uint8)
    assert memory.at_once(0) > N_FILE_EXPERT  # it looks when they are held
    ids = torch.arange(N_FILE_EXPERT)[None]
    x, scale = torch.ones(1, HIDDEN), torch.rand(1, N_FILE_EXPERT)
    expected = file.cpu.expert_ffn(whole, x, ids, scale)
    tolerance = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(file.cpu.expert_ffn(handle, x, ids, scale), expected, rtol=0, atol=tolerance)
    assert memory.counts().limit == 4 * (file.slot_bytes + PAGE)
    memory.check_integrity()
    assert memory.counts().n_held == 0
    assert taken.any()


@pytest.mark.parametrize("n_resident", [2, 3, 8])
def test_experts_are_computed_group_by_group(tmp_path: Path, n_resident: int) -> None:
    """As from memory that holds them all."""
    file = ExpertFile(tmp_path)
    memory = _cpu.ExpertMemory(N_FILE_EXPERT, 2 * n_resident * (file.slot_bytes + PAGE), 0, 0, 2)
    handle, whole = file.register(memory)
    memory.preload()
    assert memory.at_once(0) == n_resident
    cpu, rng = file.cpu, file.rng
    for n_token in (1, 5, 40):
        x = torch.from_numpy(rng.standard_normal((n_token, HIDDEN), dtype=np.float32))
        ids = torch.from_numpy(np.array([rng.choice(N_FILE_EXPERT, 4, replace=False) for _ in range(n_token)]))
        ids[0, 0] = -1
        scale = torch.rand(n_token, 4)
        expected = cpu.expert_ffn(whole, x, ids, scale)
        tolerance = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(cpu.expert_ffn(handle, x, ids, scale), expected, rtol=0, atol=tolerance)
    none = torch.full((2, 1), -1)
    assert not cpu.expert_ffn(handle, torch.ones(2, HIDDEN), none, torch.ones(2, 1)).any()
    memory.check_integrity()
    assert memory.counts().n_held == 0
