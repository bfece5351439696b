"""What the machine's memories deliver, measured, and how fast a decode step could be at best."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_engine.kernels.cpu import CpuKernels


@dataclass(frozen=True)
class Hardware:
    """Bytes per second."""

    vram: float  # read and written by a copy within the device
    pcie: float  # host to device, page-locked
    dram: float  # read by all threads; copies to the device take from it too


@dataclass(frozen=True)
class Bound:
    """The least time that a decode step's bytes take, and what it took. Seconds per step.

    The GPU's reads overlap with the CPU's and the copies; what misses must come out of RAM once, over the bus or into
    the CPU, whose sum is at most what RAM delivers.
    """

    vram_seconds: float  # dense weights, keys and values, hits
    miss_seconds: float  # experts that were not in VRAM
    step_seconds: float  # measured

    @classmethod
    def of(cls, hardware: Hardware, vram_bytes: float, miss_bytes: float, step_seconds: float) -> "Bound":
        """Bytes of one step; miss_bytes: of the distinct experts that no slot held."""
        return cls(vram_bytes / hardware.vram, miss_bytes / hardware.dram, step_seconds)

    @property
    def share(self) -> float:
        """Of the bound's speed that was reached."""
        return max(self.vram_seconds, self.miss_seconds) / self.step_seconds


RAM_SAMPLE_BYTES = 512 << 20  # far larger than the CPU's caches


def measure(device: torch.device, cpu: CpuKernels) -> Hardware:
    """Takes about half a second."""
    sample = torch.ones(RAM_SAMPLE_BYTES, dtype=torch.uint8)
    dram = max(cpu.read_rate(sample) for _ in range(3))
    if device.type != "cuda":
        return Hardware(vram=dram, pcie=dram, dram=dram)
    nbytes = 64 << 20
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return Hardware(2 * copy_rate(source, target, 8), copy_rate(host, target, 2), dram)


def copy_rate(source: Tensor, target: Tensor, repeats: int) -> float:
    """Bytes per second, the best of three times `repeats` copies."""
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, repeats * source.numel() / (time.perf_counter() - start))
    return best
