"""Experts on their way to the GPU for a prompt: copied chunk by chunk into a ring, while earlier ones are computed."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from moe_engine.expert_store import ExpertStore
from moe_engine.kernels.slot_layout import SlotLayout

CELL_BYTES = 96 << 20  # at most: a chunk costs the host some launches
N_CELL = 4  # at least, where experts are small enough, so that some arrive while others are computed
ALIGNMENT = 256


@dataclass
class Chunk:
    """Some experts of a MoE layer, ascending, that share a cell of the ring."""

    layer: int
    experts: list[int]
    cell: int
    slots: Tensor  # uint8 [n_expert, slot_bytes]
    sent: bool = False


@dataclass
class _Cell:
    events: tuple[torch.cuda.Event, ...] = ()  # copies begin, copies have arrived, products have read them
    used: bool = False  # since the events were made
    nbytes: int = 0  # of the copies between the first two


class Ring:
    """Memory in cells that are used in turn. All calls only enqueue; nothing waits for the device.

    memory: uint8, flat, room for two experts at least. largest: bytes of the largest slot. stream: for the copies;
    None: the simulated device, where everything is done at once.
    """

    def __init__(self, memory: Tensor, largest: int, store: ExpertStore, stream: torch.cuda.Stream | None) -> None:
        n_cell = max(2, min(N_CELL, len(memory) // largest), len(memory) // CELL_BYTES)
        self._cell_bytes = max(largest, len(memory) // n_cell // ALIGNMENT * ALIGNMENT)
        self._memory, self._store, self._stream = memory, store, stream
        self._cells = [_Cell() for _ in range(min(n_cell, len(memory) // self._cell_bytes))]
        if stream is not None:
            for cell in self._cells:
                cell.events = tuple(torch.cuda.Event(enable_timing=timed) for timed in (True, True, False))
        self._next = 0
        self._busy = 0  # chunks that are sent and not released

    def restart(self) -> None:
        """At the start of a prompt: the one before may have been interrupted, and the memory used by others since."""
        self._busy = 0
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def chunks(self, layer: int, layout: SlotLayout, experts: Sequence[int]) -> deque[Chunk]:
        """Gives experts, ascending, their places; every chunk has to be sent and released, in this order."""
        width, rest, found = self.width(layout), iter(experts), deque[Chunk]()
        while some := list(islice(rest, width)):
            first, nbytes = self._next * self._cell_bytes, len(some) * layout.slot_bytes
            slots = self._memory[first : first + nbytes].view(len(some), layout.slot_bytes)
            found.append(Chunk(layer, some, self._next, slots))
            self._next = (self._next + 1) % len(self._cells)
        return found

    def width(self, layout: SlotLayout) -> int:
        """Experts of a chunk."""
        return self._cell_bytes // layout.slot_bytes

    @property
    def room(self) -> int:
        """Chunks that can be sent now."""
        return len(self._cells) - self._busy

    def send(self, chunk: Chunk) -> None:
        """Copies its experts once the cell's last products are done."""
        assert self.room, "every cell is in use"
        self._busy, chunk.sent = self._busy + 1, True
        cell = self._cells[chunk.cell]
        if self._stream is None:
            self._store.copy(chunk.layer, chunk.experts, chunk.slots)
            return
        begun, arrived, free = cell.events
        with torch.cuda.stream(self._stream):
            if cell.used:
                self._stream.wait_event(free)
            begun.record(self._stream)
            self._store.copy(chunk.layer, chunk.experts, chunk.slots)
            arrived.record(self._stream)
        cell.used, cell.nbytes = True, chunk.slots.numel()

    def wait(self, chunk: Chunk) -> None:
        """Lets the current stream go on when the chunk has arrived."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._cells[chunk.cell].events[1])

    def release(self, chunk: Chunk) -> None:
        """The products that read the chunk are enqueued."""
        self._busy -= 1
        if self._stream is not None:
            self._cells[chunk.cell].events[2].record()

    def rate(self) -> float | None:
        """Bytes per second of the last copies that are known to have arrived."""
        nbytes, seconds = 0, 0.0
        for cell in self._cells:
            if cell.nbytes and cell.events[1].query():
                seconds += 1e-3 * cell.events[0].elapsed_time(cell.events[1])
                nbytes, cell.nbytes = nbytes + cell.nbytes, 0
        return nbytes / seconds if seconds else None
