"""The bound of a decode step, and what the memories deliver."""

import pytest
import torch

from moe_engine import hardware
from moe_engine.hardware import Bound, Hardware, measure
from moe_engine.kernels.cpu import CpuKernels

MACHINE = Hardware(vram=1000.0, pcie=20.0, dram=100.0)


@pytest.mark.parametrize(
    ("vram_bytes", "miss_bytes", "vram_seconds", "miss_seconds", "share"),
    [
        (2000.0, 100.0, 2.0, 1.0, 0.5),  # the GPU decides
        (1000.0, 300.0, 1.0, 3.0, 0.75),  # RAM decides, whichever way the misses take
        (1000.0, 0.0, 1.0, 0.0, 0.25),
    ],
)
def test_the_slower_memory_bounds_a_step(
    vram_bytes: float, miss_bytes: float, vram_seconds: float, miss_seconds: float, share: float
) -> None:
    bound = Bound.of(MACHINE, vram_bytes, miss_bytes, step_seconds=4.0)
    assert bound == Bound(vram_seconds, miss_seconds, 4.0)
    assert bound.share == share


def test_without_a_gpu_everything_is_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "RAM_SAMPLE_BYTES", 1 << 20)
    found = measure(torch.device("cpu"), CpuKernels(2))
    assert found.dram > 0
    assert found == Hardware(vram=found.dram, pcie=found.dram, dram=found.dram)
