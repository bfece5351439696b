"""Page-locked memory: what a GPU copies from at full speed, and what to do where the system refuses it.

Locking may take longer than reading, so it happens in the background, piece by piece, while the engine is in use. What
is not locked yet, or never can be, goes through a small ring of locked pieces.
"""

import ctypes
import queue
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moe_engine.kernels.cpu import CpuKernels

LOCK_BYTES = 64 << 20  # locked at once: meanwhile the driver lets nobody else in
RING_BYTES, RING_PIECES = 16 << 20, 4
_PAGE = 4096


class Driver(Protocol):
    """Called on one thread only. `enter` and `lock` return 0, or the error that refused it."""

    def enter(self) -> int: ...

    def lock(self, address: int, nbytes: int) -> int: ...

    def unlock(self, address: int) -> None: ...

    def leave(self) -> None: ...


class CudaDriver:
    """Not through the runtime library, which reports a refusal again at some later call."""

    def __init__(self, device: int) -> None:
        self._cuda, self._device, self._handle = ctypes.CDLL("libcuda.so.1"), device, ctypes.c_int()

    def enter(self) -> int:
        context = ctypes.c_void_p()
        return int(
            self._cuda.cuDeviceGet(ctypes.byref(self._handle), self._device)
            or self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._handle)
            or self._cuda.cuCtxSetCurrent(context)
        )

    def lock(self, address: int, nbytes: int) -> int:
        return int(self._cuda.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0))

    def unlock(self, address: int) -> None:
        self._cuda.cuMemHostUnregister(ctypes.c_void_p(address))

    def leave(self) -> None:
        self._cuda.cuDevicePrimaryCtxRelease_v2(self._handle)


class PageLocker:
    """Locks the rows of regions in the order of `add`, on a thread of its own, until `close`.

    is_ready: whether a region may be locked yet. refused: called on that thread with the driver's error; what is not
    locked then never will be.
    """

    def __init__(self, driver: Driver, is_ready: Callable[[int], bool], refused: Callable[[int], None]) -> None:
        self._driver, self._is_ready, self._note_refusal = driver, is_ready, refused
        self._was_refused = False
        self._rows: list[Tensor] = []
        self._n_locked: list[int] = []
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe_engine page locker", daemon=True)
        self._thread.start()

    def add(self, rows: Tensor) -> None:
        """rows: uint8 `[n, row_bytes]`, contiguous, from the start of a page."""
        self._rows.append(rows)
        self._n_locked.append(0)
        self._todo.put(len(self._rows) - 1)

    @staticmethod
    def rows_at_once(rows: Tensor) -> int:
        """Pieces must not share pages, and a copy must not cross from one into the next."""
        whole_pages = rows.shape[1] % _PAGE == 0
        return max(1, LOCK_BYTES // rows.shape[1]) if whole_pages else len(rows)

    def n_locked(self, index: int) -> int:
        """Rows of a region, from the first on."""
        return self._n_locked[index]

    @property
    def is_busy(self) -> bool:
        """Whether there is more to lock; not once it was refused."""
        return (
            self._thread.is_alive() and not self._was_refused and self._n_locked != [len(rows) for rows in self._rows]
        )

    def close(self) -> None:
        """Unlocks everything. No copy may be running."""
        self._stop.set()
        self._todo.put(None)
        self._thread.join()
        self._rows.clear()

    def _refuse(self, error: int) -> None:
        self._was_refused = True
        self._note_refusal(error)

    def _run(self) -> None:
        addresses: list[int] = []
        error = self._driver.enter()
        if error != 0:
            self._refuse(error)
            return
        try:
            while (index := self._todo.get()) is not None and self._lock(index, addresses):
                pass
            self._stop.wait()
        finally:
            for address in addresses:
                self._driver.unlock(address)
            self._driver.leave()

    def _lock(self, index: int, addresses: list[int]) -> bool:
        rows = self._rows[index]
        while not self._is_ready(index):
            if self._stop.wait(0.01):
                return False
        for piece in rows.split(self.rows_at_once(rows)):
            if self._stop.is_set():
                return False
            error = self._driver.lock(piece.data_ptr(), piece.numel())
            if error != 0:
                self._refuse(error)
                return False
            addresses.append(piece.data_ptr())
            self._n_locked[index] += len(piece)
        return True


class StagingRing:
    """Copies from memory that is not locked: into a locked piece with all threads, and from there as usual.

    The caller's thread does the first half. Where even a ring is refused the driver copies in its own way.
    """

    def __init__(self, device: torch.device, cpu: CpuKernels) -> None:
        self._cpu, self._cuda = cpu, device.type == "cuda"
        self._pieces: list[Tensor] = []
        self._busy: list[torch.cuda.Event | None] = [None] * RING_PIECES
        self._next = 0
        try:
            for _ in range(RING_PIECES):
                self._pieces.append(torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=self._cuda))
        except RuntimeError:  # out of lockable memory
            self._pieces.clear()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """uint8 `[n]`, both contiguous. On return the source may change; the target is written in stream order."""
        if not self._pieces:
            target.copy_(source)
            return
        for part, place in zip(source.split(RING_BYTES), target.split(RING_BYTES), strict=True):
            turn = self._next % RING_PIECES
            piece, busy = self._pieces[turn][: len(part)], self._busy[turn]
            if busy is not None:
                busy.synchronize()
            self._cpu.copy(piece, part)
            place.copy_(piece, non_blocking=True)
            if self._cuda:
                self._busy[turn] = torch.cuda.Event()
                self._busy[turn].record()  # type: ignore[union-attr]
            self._next += 1
