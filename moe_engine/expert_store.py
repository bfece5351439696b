"""Routed experts in RAM, as a GPU wants to fetch them: an expert's gate, up and down lie together, page-locked.

One fetch is then one copy at the speed of the bus, and the CPU kernels read the same bytes. Without a GPU nothing is
moved: the experts stay where the file is mapped.
"""

import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.slot_layout import SlotLayout

ExpertParts = tuple[QuantTensor, QuantTensor, QuantTensor]
"""Gate, up and down of a layer as stacks: `[n_expert, n_ff, hidden]` twice and `[n_expert, hidden, n_ff]`."""

SPARE_RAM_BYTES = 2 << 30  # left to everything else

_READERS = 8  # threads that copy from the mapped file


class ExpertStore:
    """Makes and keeps the memory of all layers; `close` gives it back.

    page_locked: copy experts into page-locked memory; without a GPU they stay where they are.
    """

    def __init__(self, page_locked: bool) -> None:
        self.page_locked = page_locked
        self._layers: list[tuple[SlotLayout, ExpertParts, Tensor | None]] = []  # the last: in slot order
        self._locked: list[int] = []  # addresses
        self._memory: list[Tensor] = []
        self.close = weakref.finalize(self, _unlock, self._locked, self._memory, self._layers)

    def add(self, layout: SlotLayout, parts: ExpertParts, stays: bool = False) -> ExpertParts:
        """Takes the next MoE layer's experts; returns where they lie now. stays: not moved, as they are not fetched.

        Where the RAM does not suffice they stay in the mapped file, from which copies are slower.
        """
        n_expert = parts[0].shape[0]
        rows = None
        if self.page_locked and not stays and n_expert * layout.slot_bytes <= available_ram_bytes() - SPARE_RAM_BYTES:
            parts, rows = self._in_slot_order(layout, parts)
        self._layers.append((layout, parts, rows))
        return parts

    def copy(self, layer: int, first: int, last: int, slots: Tensor) -> None:
        """Copies experts `first` to `last - 1` of a MoE layer into slots, uint8 `[last - first, slot_bytes]`.

        In order of the current stream, and asynchronously where the memory is page-locked.
        """
        layout, parts, rows = self._layers[layer]
        if rows is not None:
            slots.copy_(rows[first:last], non_blocking=True)
            return
        for expert, slot in zip(range(first, last), slots, strict=True):
            for view, part in zip(layout.parts(slot), parts, strict=True):
                view.data.copy_(part[expert].data, non_blocking=True)

    def _in_slot_order(self, layout: SlotLayout, parts: ExpertParts) -> tuple[ExpertParts, Tensor]:
        n_expert = parts[0].shape[0]
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
        return (views[0], views[1], views[2]), rows


def available_ram_bytes() -> int:
    """What can be taken without swapping, by the system's estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _driver() -> ctypes.CDLL:
    """Not through the runtime library, which reports a refusal again at some later call."""
    return ctypes.CDLL("libcuda.so.1")


def _unlock(locked: list[int], *memory: list[Any]) -> None:
    for address in locked:
        _driver().cuMemHostUnregister(ctypes.c_void_p(address))
    for part in (locked, *memory):
        part.clear()


def _part_of(rows: Tensor, offset: int, nbytes: int, n_out: int) -> Tensor:
    """`[n_expert, n_out, row_bytes]`, a view."""
    view: Tensor = rows[:, offset : offset + nbytes].unflatten(1, (n_out, -1))
    return view
