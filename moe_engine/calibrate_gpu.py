"""The graphics card's part of a calibration: copies, kernels, and the bundled model's decode steps."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from moe_engine.calibrate import FEW_TOKENS, GPU_TYPES, HIDDEN, MANY_TOKENS, N_FF, TOP_K, down_type, filled
from moe_engine.calibration import Gpu, Product
from moe_engine.engine import Engine
from moe_engine.hardware import copy_rate
from moe_engine.kernels.attention import attention
from moe_engine.kernels.decode_product import moe_decode
from moe_engine.kernels.dequantize import dequantize
from moe_engine.kernels.grouped_product import moe_prompt
from moe_engine.kernels.slot_layout import SlotLayout
from moe_engine.model_work import HIT_KERNELS, ModelWork
from moe_engine.predict import EXCHANGE_KERNELS

COPY_SIZES = tuple(1 << shift for shift in range(16, 27))  # 64 KiB to 64 MiB
N_EXPERT = 128
ATTENTION_TOKENS, N_HEAD, N_KV_HEAD, HEAD_DIM = 2048, 32, 4, 128  # of Qwen3-30B-A3B
STEPS = 96  # of the bundled model
LEAST = 1e-7  # seconds: what is shorter cannot be told from noise

Call = Callable[[], object]


@torch.inference_mode()
def measure_gpu(device: torch.device, threads: int, progress: Callable[[str], None]) -> Gpu:
    torch.cuda.set_device(device)
    progress("PCIe")
    target = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    host = torch.empty(max(COPY_SIZES), dtype=torch.uint8, pin_memory=True)
    pcie = {n: copy_rate(host[:n], target[:n], max(2, (32 << 20) // n)) for n in COPY_SIZES}
    progress("VRAM")
    copy = 2 * copy_rate(torch.empty_like(target), target, 8)
    progress("matrix products")
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / graph_seconds([partial(torch.matmul, a, b)])
    progress("attention of prompts")
    of_attention = _attention_rate(device)
    progress("launches")
    launch = _launch_seconds(device)
    decode, prompt, expand = {}, {}, {}
    for type in GPU_TYPES:
        progress(f"GPU experts, {type}")
        layout, pool = _experts(type, device)
        decode[type], prompt[type] = _decode_rate(layout, pool), _prompt_product(layout, pool)
        weight = filled(type, N_EXPERT * N_FF, HIDDEN, make=partial(_empty, device))
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
        expand[type] = weight.nbytes / graph_seconds([partial(dequantize, weight, out)])
    progress("decode steps")
    seconds, _, work = _bundled_steps(device, threads, "cache")
    kernel = max(seconds / (work.kernels + HIT_KERNELS * len(work.experts)), LEAST)
    progress("decode steps with misses")
    seconds, on_cpu, work = _bundled_steps(device, threads, "cpu")
    n_layer = len(work.experts)
    exchange = (seconds - on_cpu) / n_layer - (work.kernels / n_layer + EXCHANGE_KERNELS) * kernel
    facts = torch.cuda.get_device_properties(device)
    return Gpu(
        name=facts.name,
        vram_bytes=facts.total_memory,
        copy=copy,
        pcie=pcie,
        kernel_seconds=kernel,
        exchange_seconds=max(exchange, LEAST),
        launch_seconds=launch,
        decode=decode,
        prompt=prompt,
        dequantize=expand,
        matmul=matmul,
        attention=of_attention,
    )


def graph_seconds(calls: list[Call]) -> float:
    """Median time of one of `calls`, replayed in turn in a CUDA graph."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times[1:])


def _empty(device: torch.device, nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _experts(type: str, device: torch.device) -> tuple[SlotLayout, Tensor]:
    empty = partial(_empty, device)
    gate, up = (filled(type, N_FF, HIDDEN, make=empty) for _ in range(2))
    layout, slot = SlotLayout.pack(gate, up, filled(down_type(type), HIDDEN, N_FF, make=empty))
    return layout, slot.repeat(N_EXPERT, 1)


def _decode_rate(layout: SlotLayout, pool: Tensor) -> float:
    """Bytes that each expert more takes: from 1 and from 4 tokens with other experts each."""
    times = []
    for n_token in (1, 4):
        x = torch.ones(n_token, HIDDEN, device=pool.device)
        weights = torch.full((n_token, TOP_K), 1 / TOP_K, device=pool.device)
        numbers = torch.arange(N_EXPERT, dtype=torch.int32, device=pool.device)
        turns = numbers.view(-1, n_token, TOP_K)  # every call reads other experts
        times.append(graph_seconds([partial(moe_decode, x, pool, layout, slots, weights) for slots in turns]))
    return 3 * TOP_K * layout.slot_bytes / max(times[1] - times[0], LEAST)


def _prompt_product(layout: SlotLayout, pool: Tensor) -> Product:
    slots = torch.arange(N_EXPERT, dtype=torch.int32, device=pool.device)
    found = []
    for n_token in (FEW_TOKENS, MANY_TOKENS):
        x = torch.ones(n_token, HIDDEN, device=pool.device, dtype=torch.bfloat16)
        ids = (torch.arange(n_token * TOP_K, dtype=torch.int32, device=pool.device) % N_EXPERT).view(n_token, TOP_K)
        weights = torch.full(ids.shape, 1 / TOP_K, device=pool.device)
        seconds = graph_seconds([partial(moe_prompt, x, ids, weights, slots, pool, layout)])
        found.append((6.0 * HIDDEN * N_FF * ids.numel(), seconds))
    return Product.through(N_EXPERT * layout.slot_bytes, *found)


def _attention_rate(device: torch.device) -> float:
    """Operations per second; each query counts with the keys that it sees."""
    n = ATTENTION_TOKENS
    query = torch.randn(n, N_HEAD, HEAD_DIM, device=device)
    key, value = (torch.randn(n, N_KV_HEAD, HEAD_DIM, device=device) for _ in range(2))
    attention(query, key, value, HEAD_DIM**-0.5, 0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        attention(query, key, value, HEAD_DIM**-0.5, 0)
    torch.cuda.synchronize()
    return 3 * 4 * HEAD_DIM * N_HEAD * n * (n + 1) / 2 / (time.perf_counter() - start)


def _launch_seconds(device: torch.device) -> float:
    x = torch.zeros(1024, device=device)
    n = 2000
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            x.add_(1)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / n
    return seconds


def _bundled_steps(
    device: torch.device, threads: int, experts: Literal["cache", "cpu"]
) -> tuple[float, float, ModelWork]:
    """Seconds of a decode step of the bundled model, whose bytes take next to no time, and of the CPU's share in it."""
    with Engine.load(device=str(device), threads=threads, experts=experts, ctx=512, ubatch=64) as engine:
        work = ModelWork.of(engine.file, engine.model.meta, type(engine.model), engine.config.kv_dtype)
        for _ in range(2):  # the first one compiles and captures
            stats = engine.generate("Once upon a time", max_tokens=STEPS, temperature=0, stop=()).stats
    steps = max(stats.steps, stats.decode_tokens, 1)
    return stats.decode_seconds / steps, stats.cpu_seconds / steps, work
