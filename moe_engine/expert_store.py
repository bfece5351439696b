"""Routed experts in RAM, read from the file by native threads (kernels/csrc/expert_memory.h).

An expert's gate, up and down lie together, as in a cache slot, so that one fetch is one copy, and the CPU kernels read
the same bytes. If all experts fit, they are read at load, each byte once; otherwise the ones that are needed are read
when they are needed, and those used longest ago are forgotten. On the CPU, if all fit, they stay in the mapped file.
Layers that are placed on disk pass through a memory of their own, so that they never take room from the others.
"""

import logging
import os
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_engine.gguf_file import GGUFFile
from moe_engine.gguf_part import TensorInfo
from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.slot_layout import SlotLayout
from moe_engine.page_lock import CudaDriver, Driver, PageLocker, StagingRing
from moe_engine.placement import block_of, is_expert
from moe_engine.ram_plan import RamPlan

_log = logging.getLogger("moe_engine")

MAX_READERS = 16
_GAP = 4096  # between two tensors, and read with them


@dataclass(frozen=True)
class _Layer:
    memory: _cpu.ExpertMemory
    index: int  # in `memory`
    rows: Tensor  # uint8 [n_expert, slot_bytes]
    on_demand: bool  # experts are in RAM only while they are held


class ExpertStore:
    """The experts of all MoE layers, which are numbered in the order of `register`.

    in_place: experts stay in the mapped file (CPU only), unless they are placed on disk. Use: `register` every layer,
    `finish`, then the rest; `close` ends what runs in the background and may be called at any time.
    """

    def __init__(
        self,
        file: GGUFFile,
        ram: RamPlan,
        n_expert: int,
        cpu: CpuKernels,
        device: torch.device,
        *,
        in_place: bool = False,
        driver: Driver | None = None,
    ) -> None:
        """driver: locks pages; by default that of a CUDA `device`. Begins to read what else is in the file."""
        self.file, self.ram, self.cpu, self.device, self.in_place = file, ram, cpu, device, in_place
        limit = -1 if ram.limit is None else ram.limit
        n_reader = min(MAX_READERS, max(4, len(os.sched_getaffinity(0))))
        self.memory = _cpu.ExpertMemory(n_expert, limit, ram.process, ram.least, n_reader)
        self.disk_memory = _cpu.ExpertMemory(n_expert, ram.window, 0, 0, n_reader) if ram.disk_layers else None
        self._layers: list[_Layer] = []
        self._ring: StagingRing | None = None
        self._locker: PageLocker | None = None
        if driver is None and device.type == "cuda":
            driver = CudaDriver(device.index or 0)
        if driver is not None and ram.holds_all and not in_place:
            self._locker = PageLocker(driver, self.memory.is_read, partial(_warn_of_refusal, device, cpu))
            weakref.finalize(self, self._locker.close)
        for memory in self._memories:
            for path in file.paths:
                memory.add_file(str(path))
        mapped = [
            info
            for info in file.tensors.values()
            if not is_expert(info.name) or (in_place and block_of(info.name) not in ram.disk_layers)
        ]
        for part, offset, nbytes in _runs(mapped):
            self.memory.add_cached(part, offset, nbytes)
        self._expected = self.memory.bytes_total() + (0 if in_place else ram.routed - ram.on_disk)

    @property
    def _memories(self) -> list[_cpu.ExpertMemory]:
        return [self.memory] if self.disk_memory is None else [self.memory, self.disk_memory]

    def register(self, block: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> ExpertHandle:
        """The next MoE layer, which is in this block of the model.

        gate, up, down: views of the mapped file, gate and up `[n_expert, n_ff, hidden]`, down the other way round.
        Returns at once. The handle's weights may be used after `finish`, by `CpuKernels.expert_ffn`, which waits for
        reads; any other use needs `hold`.
        """
        memory = self.disk_memory if self.disk_memory is not None and block in self.ram.disk_layers else self.memory
        on_demand = memory is self.disk_memory or not self.ram.holds_all
        if self.in_place and not on_demand:
            return self.cpu.register_experts(gate, up, down)
        n_expert, n_ff, hidden = gate.shape
        layout = SlotLayout.of(gate.type, up.type, down.type, hidden, n_ff)
        spots, parts = (layout.gate, layout.up, layout.down), []
        for stack, spot in zip((gate, up, down), spots, strict=True):
            part, offset = self.file.place_of(stack.data)
            parts.append((part, offset, stack.data.stride(0), spot.nbytes, spot.offset))
        index = memory.add_layer(layout.slot_bytes, parts)
        rows = memory.region(index, n_expert * layout.slot_bytes).view(n_expert, layout.slot_bytes)
        self._layers.append(_Layer(memory, index, rows, on_demand))
        if self._locker is not None and not on_demand:
            self._locker.add(rows)
        views = [
            QuantTensor(
                rows[:, spot.offset : spot.offset + spot.nbytes].unflatten(1, (spot.n_out, -1)), spot.type, spot.n_in
            )
            for spot in spots
        ]
        handle = self.cpu.register_experts(*views)
        if on_demand:
            handle.layer.read_from(memory, index)
        return handle

    @property
    def reads_on_demand(self) -> bool:
        """Whether a layer has experts that are in RAM only while they are held."""
        return any(layer.on_demand for layer in self._layers)

    @property
    def on_demand_bytes(self) -> int:
        """Of experts that are in RAM now and can leave it."""
        return sum(memory.counts().resident_bytes for memory in self._memories if memory.counts().limit >= 0)

    def progress(self) -> tuple[int, int]:
        """Bytes read and bytes to be read at load."""
        return self.memory.bytes_done(), max(self._expected, self.memory.bytes_total())

    @property
    def is_locking(self) -> bool:
        """Whether memory is still being page-locked, which slows copies."""
        return self._locker is not None and self._locker.is_busy

    def finish(self, report: Callable[[], None]) -> None:
        """Waits until all is read that is to be read at load, and calls `report` meanwhile.

        Raises `ModelFormatError` for a file that cannot be read.
        """
        self.memory.preload()
        while not self.memory.wait(0.1):
            report()
        self._expected = 0
        report()

    def copy(self, index: int, experts: Sequence[int], slots: Tensor) -> None:
        """Copies experts, ascending, of MoE layer `index` into `slots`, in the order of the current stream.

        slots: uint8 `[n, slot_bytes]`, contiguous, on the device. Returns before the copies are done, but where the
        memory is not page-locked it takes as long as bringing the bytes into a ring that is.
        """
        layer = self._layers[index]
        if layer.on_demand:
            self._copy_held(index, experts, slots)
            return
        rows, n_locked = layer.rows, 0
        if self._locker is not None:
            n_locked = bisect_left(experts, self._locker.n_locked(layer.index))
            stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else None
            at_once = self._locker.rows_at_once(rows)
            _cpu.copy_rows(slots.data_ptr(), rows.data_ptr(), rows.shape[1], experts[:n_locked], at_once, stream)
        for place, expert in enumerate(experts[n_locked:], n_locked):
            self._copy_unlocked(rows[expert], slots[place])

    def _copy_held(self, index: int, experts: Sequence[int], slots: Tensor) -> None:
        layer = self._layers[index]
        ahead = max(1, layer.memory.at_once(layer.index) // 2)
        for place, expert in enumerate(experts):
            with self.hold(index, [expert]):
                self.prefetch(index, experts[place + 1 : place + 1 + ahead])
                self._copy_unlocked(layer.rows[expert], slots[place])

    def _copy_unlocked(self, source: Tensor, target: Tensor) -> None:
        if self.device.type != "cuda" and self._locker is None:
            target.copy_(source)
            return
        if self._ring is None:
            self._ring = StagingRing(self.device, self.cpu)
        self._ring.copy(source.view(-1), target.view(-1))

    @contextmanager
    def hold(self, index: int, experts: Sequence[int]) -> Iterator[None]:
        """Within it these experts of a MoE layer are in RAM.

        Raises `CapacityError` for more than the RAM budget holds, `ModelFormatError` if they cannot be read.
        """
        layer, ids = self._layers[index], list(experts)
        if not layer.on_demand:
            yield
            return
        layer.memory.hold(layer.index, ids)
        try:
            yield
        finally:
            layer.memory.release(layer.index, ids)

    def prefetch(self, index: int, experts: Sequence[int]) -> None:
        """Begins to read experts of a MoE layer, the first ones first, as far as there is room; returns at once."""
        layer = self._layers[index]
        if layer.on_demand:
            layer.memory.prefetch(layer.index, list(experts))

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all reading and gives page-locked memory back. The store cannot be used afterwards."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._locker is not None:
            self._locker.close()
            self._locker = None
        for memory in self._memories:
            memory.stop()
        self._layers.clear()
        self._ring = None


def _warn_of_refusal(device: torch.device, cpu: CpuKernels, error: int) -> None:
    """On the locker's thread."""
    rates = _copy_rates(device, cpu)
    cost = "" if rates is None else f", at {rates[0] / 1e9:.1f} GB/s instead of {rates[1] / 1e9:.1f}"
    _log.warning(
        "the system refuses to page-lock the experts' memory (CUDA error %d): copies to the GPU go through a small "
        "page-locked buffer%s. Containers: allow it with --ulimit memlock=-1",
        error,
        cost,
    )


def _runs(tensors: Sequence[TensorInfo]) -> Iterator[tuple[int, int, int]]:
    """Where tensors lie, neighbours as one: part, offset, bytes."""
    part, start, end = -1, 0, 0
    for info in sorted(tensors, key=lambda info: (info.part, info.offset)):
        if info.part != part or info.offset > end + _GAP:
            if end > start:
                yield part, start, end - start
            part, start = info.part, info.offset
        end = info.offset + info.nbytes
    if end > start:
        yield part, start, end - start


def _copy_rates(device: torch.device, cpu: CpuKernels) -> tuple[float, float] | None:
    """Bytes per second to the GPU through a ring, and from locked memory; None where that cannot be measured."""
    if device.type != "cuda":
        return None
    nbytes = 16 << 20
    with torch.cuda.stream(torch.cuda.Stream(device)):
        try:
            locked = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError:
            return None
        source, ring = torch.ones(nbytes, dtype=torch.uint8), StagingRing(device, cpu)
        rates = []
        for run in (lambda: ring.copy(source, target), lambda: target.copy_(locked, non_blocking=True)):
            best = 0.0
            for _ in range(3):
                start = time.perf_counter()
                run()
                torch.cuda.current_stream(device).synchronize()
                best = max(best, nbytes / (time.perf_counter() - start))
            rates.append(best)
    return rates[0], rates[1]
