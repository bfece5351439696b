"""Routed experts in RAM, as a GPU wants to fetch them: an expert's gate, up and down lie together, page-locked.

One fetch is then one copy at the speed of the bus, and the CPU kernels read the same bytes. Without a GPU nothing is
moved: the experts stay where the file is mapped.
"""

import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.slot_layout import SlotLayout

ExpertParts = tuple[QuantTensor, QuantTensor, QuantTensor]
"""Gate, up and down of a layer as stacks: `[n_expert, n_ff, hidden]` twice and `[n_expert, hidden, n_ff]`."""

SPARE_RAM_BYTES = 2 << 30  # left to everything else

_READERS = 8  # threads that copy from the mapped file


class ExpertStore:
    """Makes and keeps the memory of all layers; `close` gives it back."""

    def __init__(self) -> None:
        self._locked: list[int] = []  # addresses
        self._memory: list[Tensor] = []
        self.close = weakref.finalize(self, _unlock, self._locked, self._memory)

    def add(self, layout: SlotLayout, parts: ExpertParts) -> ExpertParts:
        """Copies a layer's experts into page-locked memory in the layout of a slot; returns views of them.

        Where the RAM does not suffice they stay in the mapped file, from which copies are slower.
        """
        n_expert = parts[0].shape[0]
        if n_expert * layout.slot_bytes > available_ram_bytes() - SPARE_RAM_BYTES:
            return parts
        rows = torch.empty(n_expert, layout.slot_bytes, dtype=torch.uint8)
        views = tuple(
            QuantTensor(_part_of(rows, spot.offset, spot.nbytes, spot.n_out), spot.type, spot.n_in)
            for spot in (layout.gate, layout.up, layout.down)
        )

        @torch.inference_mode()  # of this thread
        def copy(expert: int) -> None:
            for view, part in zip(views, parts, strict=True):
                view.data[expert].copy_(part.data[expert])

        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(copy, range(n_expert)))
        self._memory.append(rows)
        # If it is refused (limits, containers) copies are slower and results the same.
        if _driver().cuMemHostRegister_v2(ctypes.c_void_p(rows.data_ptr()), ctypes.c_size_t(rows.numel()), 0) == 0:
            self._locked.append(rows.data_ptr())
        return views[0], views[1], views[2]


def available_ram_bytes() -> int:
    """What can be taken without swapping, by the system's estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _driver() -> ctypes.CDLL:
    """Not through the runtime library, which reports a refusal again at some later call."""
    return ctypes.CDLL("libcuda.so.1")


def _unlock(locked: list[int], memory: list[Tensor]) -> None:
    for address in locked:
        _driver().cuMemHostUnregister(ctypes.c_void_p(address))
    locked.clear()
    memory.clear()


def _part_of(rows: Tensor, offset: int, nbytes: int, n_out: int) -> Tensor:
    """`[n_expert, n_out, row_bytes]`, a view."""
    view: Tensor = rows[:, offset : offset + nbytes].unflatten(1, (n_out, -1))
    return view
