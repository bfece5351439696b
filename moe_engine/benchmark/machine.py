"""What is measured of the machine, and the memory that this process takes of it."""

import contextlib
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from moe_engine.backend import choose_device
from moe_engine.benchmark.environment import Environment, gpu_id, vram_in_use
from moe_engine.config import EngineConfig
from moe_engine.hardware import Hardware, measure
from moe_engine.kernels.cpu import CpuKernels


class Machine:
    """What is measured once: what the memories deliver, the arithmetic, and how much VRAM others use."""

    def __init__(self, config: EngineConfig) -> None:
        self.gpu = gpu_id(config.device)
        self.vram_of_others = vram_in_use(self.gpu)  # before this process takes any
        self.device, self.accelerated = choose_device(config.device)
        self.hardware: Hardware = measure(self.device, CpuKernels(config.n_threads))

    @cached_property
    def matmul_rate(self) -> float:
        """Operations per second of a large bf16 product; 0 without a GPU. Measured at the first use, when nothing is
        loaded: it takes memory that would count as the engine's."""
        return _matmul_rate(self.device) if self.device.type == "cuda" else 0.0

    def environment(self, arguments: Sequence[str]) -> Environment:
        return Environment.find(arguments, self.device, self.gpu, self.hardware)

    def vram_peak(self) -> int:
        """Bytes that this process has held at most since its engine was loaded: what it holds, and what PyTorch has
        held beyond that. 0 without a GPU."""
        if self.device.type != "cuda":
            return 0
        beyond = torch.cuda.max_memory_reserved(self.device) - torch.cuda.memory_reserved(self.device)
        return max(0, vram_in_use(self.gpu) - self.vram_of_others) + beyond


def reset_peak_ram() -> None:
    """Makes the kernel forget this process's largest resident size, where it allows that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_ram() -> int:
    """Largest resident size, in bytes, since `reset_peak_ram`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _matmul_rate(device: torch.device) -> float:
    """Operations per second of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        torch.cuda.synchronize(device)
        best = max(best, 4 * 2 * 8192**3 / (time.perf_counter() - started))
    del a, b
    torch.cuda.empty_cache()
    return best
