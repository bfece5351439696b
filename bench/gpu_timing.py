"""What the benches of GPU kernels share: CUDA graph timing, ceilings, checks and rows of results."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from random_blocks import random_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CACHE_BYTES = 160 << 20
"""What a graph's calls read in all, at least: three times an H200's last-level cache."""

Row = dict[str, Any]
Call = Callable[[], object]


def copies(n_bytes: int) -> int:
    """How many inputs of that size a graph's calls take turns with, so that the cache does not hold them."""
    return 1 if DEVICE.type == "cpu" else max(1, -(-CACHE_BYTES // n_bytes))


class Traffic:
    """Copies of 3 MB from the host, as of experts, that keep the bus busy for some milliseconds."""

    def __init__(self, n_copy: int = 150, nbytes: int = 3 << 20) -> None:
        self._n_copy, self._stream = n_copy, torch.cuda.Stream()
        self._host = torch.zeros(16, nbytes, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)

    def start(self) -> None:
        with torch.cuda.stream(self._stream):
            for i in range(self._n_copy):
                self._device.copy_(self._host[i % len(self._host)], non_blocking=True)


def microseconds(calls: list[Call], least: int = 20, replays: int = 15, beside: Call | None = None) -> float:
    """Median time of one of `calls`, replayed in turn in a graph of at least `least`, or of fewer that take long.

    beside: called before each replay, for what is to go on at the same time.
    """
    calls[0]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    calls[0]()
    end.record()
    end.synchronize()
    if start.elapsed_time(end) > 0.3:
        least = min(least, 3)
    calls = calls * -(-least // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        torch.cuda.synchronize()
        if beside is not None:
            beside()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / len(calls))
    return statistics.median(times[2:])


def copy_rate() -> float:
    """GB/s of a device-to-device copy, bytes read + written. Not in a graph, whose copies are slower."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return 2 * source.nbytes / statistics.median(times[2:]) / 1e6


def matmul_rate() -> float:
    """TFLOP/s of a bf16 product of 8192 x 8192 x 8192."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / microseconds([lambda: a @ b], least=3) / 1e6


class Report:
    """Rows of results, printed as they come. On a machine without a GPU nothing is timed."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.rows: list[Row] = []

    def add(
        self,
        kernel: str,
        type: str,
        shape: str,
        calls: list[Call],
        *,
        error: float,
        n_bytes: float = 0,
        operations: float = 0,
        reference: Call | None = None,
        beside: Call | None = None,
    ) -> Row:
        """n_bytes: what a call reads at least. reference: the same in torch, for comparison. beside: timed again while
        what this starts goes on."""
        row: Row = {"family": self.family, "kernel": kernel, "type": type, "shape": shape, "error": error}
        if DEVICE.type == "cuda":
            row["microseconds"] = microseconds(calls)
            if beside is not None:
                row["beside_copies_microseconds"] = microseconds(calls, beside=beside)
            if reference is not None:
                row["reference_microseconds"] = microseconds([reference], least=3, replays=7)
            if n_bytes:
                row["gb_per_s"] = n_bytes / row["microseconds"] / 1e3
            if operations:
                row["tflops"] = operations / row["microseconds"] / 1e6
        self.rows.append(row)
        print(
            " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )
        return row


def check(name: str, actual: Tensor, expected: Tensor, limit: float) -> float:
    """The relative error over the whole tensor. Ends the program if it is too large."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not error < limit:
        raise SystemExit(f"{name}: relative error {error:.2e}, expected below {limit}")
    return error


def check_equal(name: str, actual: Tensor, expected: Tensor) -> float:
    """No error. Ends the program if they differ."""
    if not torch.equal(actual.cpu(), expected.cpu()):
        raise SystemExit(f"{name}: differs from the reference")
    return 0.0


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def int32(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=DEVICE)


def exact_values(weight: QuantTensor) -> Tensor:
    """F64 on the device, from the gguf package."""
    data = np.ascontiguousarray(weight.data.cpu().numpy())
    floats = quants.dequantize(data, GGMLQuantizationType(weight.type.id))
    return torch.tensor(floats, device=DEVICE).view(weight.shape).double()


def random_weight(name: str, *shape: int) -> QuantTensor:
    """Random blocks `[..., n_out, n_in]`; those after the first 256 rows repeat them, which are slow to draw."""
    type, n_in, n_row = BY_NAME[name], shape[-1], int(np.prod(shape[:-1]))
    few = torch.from_numpy(random_blocks(type, min(256, n_row), n_in, np.random.default_rng(type.id)))
    data = few.to(DEVICE).repeat(-(-n_row // len(few)), 1)[:n_row]
    return QuantTensor(data.reshape(*shape[:-1], -1).contiguous(), type, n_in)
