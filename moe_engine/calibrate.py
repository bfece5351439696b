"""Measures what this machine delivers, with the kernels that the engine uses; takes about a minute."""

import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from moe_engine import hardware
from moe_engine.calibration import Calibration, CpuProduct, processor_name
from moe_engine.errors import CalibrationError
from moe_engine.kernels.cpu import CpuKernels, host_buffer
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME

CPU_TYPES = ("Q2_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4")
GPU_TYPES = ("Q4_K", "Q6_K", "Q8_0")
HIDDEN, N_FF, TOP_K = 2048, 768, 8  # of Qwen3-30B-A3B; other models' experts are larger
FEW_TOKENS, MANY_TOKENS = 64, 4096  # of the GPU's products for prompts
FEW = 2  # experts, beside TOP_K
CPU_ROUNDS = 5  # of which the best counts
CPU_TOKENS, MANY_CALLS = 64, 4  # of each expert, for the CPU's products of many tokens
BYTE = 0x11  # what the CPU's weights are filled with: scales in half precision are then small and normal
POOL_SAMPLES = 2  # how much larger memory of experts is than what a quick measurement of RAM reads
LEAST = 1e-7  # seconds: what is shorter cannot be told from noise
DISK_BYTES, DISK_READERS, DISK_CHUNK = 2 << 30, 4, 8 << 20

Progress = Callable[[str], None]


def calibrate(
    device: torch.device, threads: int, file: Path | None, progress: Progress = lambda what: None
) -> Calibration:
    """device: CUDA, or the CPU where there is no graphics card. file: something large to read from the disk; None: the
    disk is not measured. progress: called with what is measured next. Raises `CalibrationError` for an unreadable file.
    """
    disk = None
    if file is not None:
        progress("disk")
        disk = disk_rate(file)
    dram, experts, call = _measure_cpu(threads, progress)
    gpu = None
    if device.type == "cuda":
        from moe_engine.calibrate_gpu import measure_gpu

        gpu = measure_gpu(device, threads, progress)
    return Calibration(processor_name(), threads, _ram_bytes(), dram, experts, call, disk, gpu)


def n_steps(device: torch.device, with_disk: bool) -> int:
    """How often `calibrate` calls progress."""
    return CPU_ROUNDS + with_disk + (6 + len(GPU_TYPES) if device.type == "cuda" else 0)


def _ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def expert_memory() -> torch.Tensor:
    """What experts are read from. Last-level caches of up to 300 MB hold a part of it, as they hold a part of what a
    decode step reads again in the next one: on an H200 host as large a part with a GiB, more with half of one."""
    return host_buffer(min(POOL_SAMPLES * hardware.RAM_SAMPLE_BYTES, _ram_bytes() // 32)).fill_(BYTE)


def _measure_cpu(threads: int, progress: Progress) -> tuple[dict[int, float], dict[str, CpuProduct], float]:
    """Rates of RAM by threads, of the experts by type, and seconds of a call besides.

    In rounds, of which the best counts: shared hosts are slow for seconds.
    """
    memory, cpu = expert_memory(), CpuKernels(threads)
    calls = {type: ExpertCalls(cpu, type, memory) for type in CPU_TYPES}
    rates, times = [], []
    for turn in range(CPU_ROUNDS):
        progress(f"RAM and CPU experts, {turn + 1} of {CPU_ROUNDS}")
        rates.append(_dram_rates(threads, memory))
        times.append({type: of_type.times() for type, of_type in calls.items()})
    dram = {n: max(found[n] for found in rates) for n in rates[0]}
    experts, fixed = {}, []
    for type, of_type in calls.items():
        few, fewer, many = (min(found) for found in zip(*(turn[type] for turn in times), strict=True))
        rest = min(max(0.0, few - (few - fewer) * TOP_K / (TOP_K - FEW)), few / 2)  # times may be disturbed
        one, more = (of_type.operations, few - rest), (CPU_TOKENS * of_type.operations, many - rest)
        experts[type] = CpuProduct.through(of_type.nbytes, one, more)
        fixed.append(rest)
    return dram, experts, max(statistics.median(fixed), LEAST)


def _dram_rates(threads: int, memory: torch.Tensor) -> dict[int, float]:
    counts = sorted({min(1 << i, threads) for i in range(threads.bit_length() + 1)})
    return {n: max(CpuKernels(n).read_rate(memory) for _ in range(2)) for n in counts}


def filled(type: str, *shape: int, make: Callable[[int], torch.Tensor]) -> QuantTensor:
    """Weights of a type. make: so many bytes."""
    nbytes = BY_NAME[type].row_bytes(shape[-1])
    for size in shape[:-1]:
        nbytes *= size
    return QuantTensor(make(nbytes).view(*shape[:-1], -1), BY_NAME[type], shape[-1])


def down_type(type: str) -> str:
    """Rows of N_FF must be whole blocks."""
    return type if N_FF % BY_NAME[type].block_size == 0 else "Q8_0"


class ExpertCalls:
    """Calls of the CPU's experts of a type, each with the next ones in `expert_memory`."""

    def __init__(self, cpu: CpuKernels, type: str, memory: torch.Tensor) -> None:
        shapes = ((type, N_FF, HIDDEN), (type, N_FF, HIDDEN), (down_type(type), HIDDEN, N_FF))
        sizes = [n_row * BY_NAME[name].row_bytes(n_in) for name, n_row, n_in in shapes]
        n_expert = max(2 * TOP_K, len(memory) // sum(sizes))
        if len(memory) < n_expert * sum(sizes):
            memory = host_buffer(n_expert * sum(sizes)).fill_(BYTE)
        parts = iter(memory[: n_expert * sum(sizes)].split([n_expert * size for size in sizes]))
        self.cpu = cpu
        self.handle = cpu.register_experts(
            *(filled(name, n_expert, n_row, n_in, make=lambda _: next(parts)) for name, n_row, n_in in shapes)
        )
        self.turns = [torch.arange(i, i + TOP_K)[None] for i in range(0, n_expert - TOP_K + 1, TOP_K)]
        self.nbytes = TOP_K * sum(sizes)  # of a call
        self.operations = 6.0 * HIDDEN * N_FF * TOP_K  # for each token

    def seconds(self, n_token: int = 1, n_expert: int = TOP_K, n_call: int | None = None) -> float:
        """Median of at most `n_call` calls, after one that warms up."""
        x = torch.ones(n_token, HIDDEN)
        weights = torch.full((n_token, n_expert), 1 / TOP_K)
        chosen = [ids[:, :n_expert].expand(n_token, n_expert).contiguous() for ids in self.turns[:n_call]]
        return _median([partial(self.cpu.expert_ffn, self.handle, x, ids, weights) for ids in chosen])

    def times(self) -> tuple[float, float, float]:
        """Seconds of a call of one token, of one with fewer experts, and of one with many tokens."""
        return self.seconds(), self.seconds(n_expert=FEW), self.seconds(CPU_TOKENS, n_call=MANY_CALLS)


def _median(calls: list[Callable[[], object]]) -> float:
    """Seconds of a call, after one round that warms up."""
    calls[0]()
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def disk_rate(file: Path) -> float:
    """Bytes per second of direct reads, past the page cache, by several readers."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as e:
        raise CalibrationError(f"{file}: cannot be read directly: {e.strerror}") from e
    try:
        size = min(os.fstat(descriptor).st_size, DISK_BYTES)
        starts = range(0, size - DISK_CHUNK + 1, DISK_CHUNK)
        if not starts:
            raise CalibrationError(
                f"{file}: has {size} bytes: the disk is measured with files of at least {DISK_CHUNK}"
            )

        def read(reader: int) -> int:
            with mmap.mmap(-1, DISK_CHUNK) as buffer:  # aligned, as direct reads need it
                return sum(os.preadv(descriptor, [buffer], start) for start in starts[reader::DISK_READERS])

        begin = time.perf_counter()
        with ThreadPoolExecutor(DISK_READERS) as pool:
            total = sum(pool.map(read, range(DISK_READERS)))
        return total / (time.perf_counter() - begin)
    except OSError as e:
        raise CalibrationError(f"{file}: cannot be read directly: {e.strerror}") from e
    finally:
        os.close(descriptor)
