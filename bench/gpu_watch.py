"""Samples of the memory that a GPU has in use while something runs, by its management library.

The number is nvidia-smi's, without its program: starting that ten times a second takes processor time from what is
measured (https://docs.nvidia.com/deploy/nvml-api).
"""

import ctypes
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from moe_engine.benchmark.environment import gpu_id

SECONDS = 0.1  # between two samples


class _Memory(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class GpuStatus:
    """Of the first GPU that this process may use. Raises OSError if the library is missing or refuses."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        name = gpu_id("cuda")
        if name.isdigit():
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(name)), ctypes.byref(self._device))
        else:
            self._call("nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self._device))

    def _call(self, function: str, *arguments: Any) -> None:
        error = getattr(self._library, function)(*arguments)
        if error:
            raise OSError(f"{function} ended with error {error}")

    def used(self) -> int:
        """Bytes of memory that anyone uses."""
        memory = _Memory(version=ctypes.sizeof(_Memory) | 2 << 24)
        self._call("nvmlDeviceGetMemoryInfo_v2", self._device, ctypes.byref(memory))
        return int(memory.used)


@dataclass
class GpuWatch:
    """Samples until the block ends. status: None where there is no GPU, then nothing is sampled."""

    status: GpuStatus | None
    peak: int = 0  # bytes
    before: int = 0  # when it began
    _stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, device: str) -> Self:
        return cls(GpuStatus() if device == "cuda" else None)

    def _watch(self, status: GpuStatus) -> None:
        while not self._stop.wait(SECONDS):
            self.peak = max(self.peak, status.used())

    def __enter__(self) -> Self:
        if self.status is not None:
            self.before = self.peak = self.status.used()
            self._thread = threading.Thread(target=self._watch, args=(self.status,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.status is not None:
            self._stop.set()
            self._thread.join()
