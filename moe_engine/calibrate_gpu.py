"""The graphics card's part of a calibration: copies, kernels, and the bundled model's decode steps and prompts."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from moe_engine.benchmark.random_model import write_model
from moe_engine.calibrate import FEW_TOKENS, GPU_TYPES, HIDDEN, LEAST, MANY_TOKENS, N_FF, TOP_K, down_type, filled
from moe_engine.calibration import CHOICE_CHUNKS, Gpu, Product, closest
from moe_engine.engine import Engine
from moe_engine.expert_cache import CachedExperts
from moe_engine.expert_ring import N_CELL
from moe_engine.graph_decoder import PROMPT_SIZES, GraphDecoder
from moe_engine.hardware import copy_rate
from moe_engine.kernels.decode_product import moe_decode
from moe_engine.kernels.dequantize import dequantize
from moe_engine.kernels.grouped_product import moe_prompt
from moe_engine.kernels.prompt_attention import prompt_attention
from moe_engine.kernels.slot_layout import SlotLayout
from moe_engine.model_work import HIT_KERNELS, ModelWork
from moe_engine.prompt_experts import PromptExperts
from moe_engine.stats import Stats

COPY_SIZES = tuple(1 << shift for shift in range(16, 27))  # 64 KiB to 64 MiB
N_EXPERT = 128
FINITE = 0x77  # bits of random weights that leave scales in half precision finite
ATTENTION_TOKENS, N_HEAD, N_KV_HEAD, HEAD_DIM = 4096, 32, 4, 128  # of Qwen3-30B-A3B
MODEL, LAYERS, STEPS, RUNS = "qwen3-30b-a3b", 4, 128, 7  # for decode steps
STREAM_SLOTS, STREAM_CHUNKS = 4, 5  # cached experts of each size, and chunks that a layer's others come in
PROMPT_TOKENS = 512  # with which the host takes longer than the GPU
PROMPTS, ROUNDS = 25, 4  # of each model, each way; shared hosts are slow for seconds, so the best round counts

Call = Callable[[], object]


@torch.inference_mode()
def measure_gpu(device: torch.device, threads: int, progress: Callable[[str], None]) -> Gpu:
    """Raises `CalibrationError` for rates that cannot be."""
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
    decode, prompt, expand = {}, {}, {}
    for type in GPU_TYPES:
        progress(f"GPU experts, {type}")
        layout, pool = _experts(type, device)
        decode[type], prompt[type] = _decode_rate(layout, pool), _prompt_product(layout, pool)
        weight = filled(type, N_EXPERT * N_FF, HIDDEN, make=partial(_random_bytes, device))
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
        expand[type] = weight.nbytes / graph_seconds([partial(dequantize, weight, out)])
    with large_layers() as path:
        progress("decode steps")
        kernel, exchange = _decode_costs(path, device, threads, decode)
        progress("prompts")
        layers = [prompt_layer_seconds(path, device, threads) for _ in range(ROUNDS)]
    rounds = [(*_bundled_prompts(device, threads), _bundled_stream(device, threads)) for _ in range(ROUNDS)]
    steps, in_vram, streamed = zip(*rounds, strict=True)
    facts = torch.cuda.get_device_properties(device)
    return Gpu(
        name=facts.name,
        vram_bytes=facts.total_memory,
        copy=copy,
        pcie=pcie,
        kernel_seconds=kernel,
        exchange_seconds=exchange,
        step_seconds={n: min(found[n] for found in steps) for n in PROMPT_SIZES},
        layer_seconds=min(layers),
        chunk_seconds=max(min(streamed) - min(in_vram), LEAST) / (CHOICE_CHUNKS + STREAM_CHUNKS),
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


def _random_bytes(device: torch.device, nbytes: int) -> Tensor:
    """Products of equal numbers take the tensor cores less power, so that they run faster than a model's."""
    return torch.randint(256, (nbytes,), dtype=torch.uint8, device=device) & FINITE


def _experts(type: str, device: torch.device) -> tuple[SlotLayout, Tensor]:
    make = partial(_random_bytes, device)
    gate, up = (filled(type, N_FF, HIDDEN, make=make) for _ in range(2))
    layout, slot = SlotLayout.pack(gate, up, filled(down_type(type), HIDDEN, N_FF, make=make))
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
    """Tokens choose at random, so that groups end in partly filled tiles, as in prompts."""
    slots = torch.arange(N_EXPERT, dtype=torch.int32, device=pool.device)
    found = []
    for n_token in (FEW_TOKENS, MANY_TOKENS):
        x = torch.randn(n_token, HIDDEN, device=pool.device, dtype=torch.bfloat16)
        ids = torch.rand(n_token, N_EXPERT, device=pool.device).topk(TOP_K).indices.int()
        weights = torch.full(ids.shape, 1 / TOP_K, device=pool.device)
        seconds = graph_seconds([partial(moe_prompt, x, ids, weights, slots, pool, layout)])
        found.append((6.0 * HIDDEN * N_FF * ids.numel(), seconds))
    return Product.through(N_EXPERT * layout.slot_bytes, *found)


def _attention_rate(device: torch.device) -> float:
    """Operations per second; each query counts with the keys that it sees."""
    n = ATTENTION_TOKENS
    query = torch.randn(n, N_HEAD, HEAD_DIM, device=device)
    key, value = (torch.randn(n, N_KV_HEAD, HEAD_DIM, device=device, dtype=torch.float16) for _ in range(2))
    seconds = graph_seconds([partial(prompt_attention, query, key, value, HEAD_DIM**-0.5, 0)])
    return 4 * HEAD_DIM * N_HEAD * n * (n + 1) / 2 / seconds


# -- a few layers of a large model -----------------------------------------------------------------------------


@contextmanager
def large_layers() -> Iterator[Path]:
    """A file with some, which is removed at the end."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(MODEL, path, layers=LAYERS, skew=0.0)
        yield path


def _decode_costs(path: Path, device: torch.device, threads: int, decode: Mapping[str, float]) -> tuple[float, float]:
    """Seconds of a kernel besides what is read, if all is in VRAM; and how much longer the GPU waits for the answer of
    a layer of which all is missed than the CPU computes."""
    hit, work = _steps(path, device, threads, "cache")
    missed, _ = _steps(path, device, threads, "cpu")
    in_vram = statistics.median(stats.decode_seconds / _n_step(stats) for stats in hit)
    dense = sum(nbytes / closest(decode, type) for type, nbytes in work.dense.items())
    by_type = [item for layer in work.experts for item in layer.by_type.items()]
    hits = sum(work.top_k * nbytes / closest(decode, type) for type, nbytes in by_type)
    kernel = (in_vram - dense - hits) / (work.kernels + HIT_KERNELS * len(work.experts))
    exchange = statistics.median((stats.gpu_wait_seconds - stats.cpu_seconds) / _n_step(stats) for stats in missed)
    return max(kernel, LEAST), max(exchange / len(work.experts), LEAST)


def _steps(path: Path, device: torch.device, threads: int, experts: str) -> tuple[list[Stats], ModelWork]:
    """Of drawn tokens: greedy ones soon choose the same experts again and again. Several runs, because hosts pause."""
    options: dict[str, Any] = {"device": str(device), "threads": threads, "ctx": 512, "profile": False}
    with Engine.load(path, experts=experts, **options) as engine:
        found = []
        for seed in range(1 + RUNS):  # the first one compiles and captures
            found.append(engine.generate([1], max_tokens=STEPS, temperature=1.0, ignore_eos=True, seed=seed).stats)
        work = ModelWork.of(engine.file, engine.model.meta, type(engine.model), engine.config.kv_dtype)
        return found[1:], work


def prompt_layer_seconds(path: Path, device: torch.device, threads: int) -> float:
    """Of the host, which takes longer than the GPU, for a layer of `large_layers`: all experts in VRAM."""
    n = PROMPT_TOKENS
    options: dict[str, Any] = {"device": str(device), "threads": threads, "ctx": n + 8, "ubatch": n, "profile": False}
    with Engine.load(path, experts="cache", **options) as engine:
        return _median_seconds(partial(_micro_batch, engine)) / len(engine.model.blk)


def _n_step(stats: Stats) -> int:
    return max(stats.steps, stats.decode_tokens, 1)


# -- the bundled model, whose bytes take next to no time -------------------------------------------------------


def _bundled(device: torch.device, threads: int, **options: Any) -> Engine:
    common: dict[str, Any] = {"device": str(device), "threads": threads, "ctx": 512, "ubatch": 64, "profile": False}
    return Engine.load(**common | options)


def _bundled_prompts(device: torch.device, threads: int) -> tuple[dict[int, float], float]:
    """Seconds of a layer of a step, by prompt tokens, and of the host for a micro-batch: all experts in VRAM."""
    with _bundled(device, threads, experts="cache") as engine:
        assert isinstance(engine.decoder, GraphDecoder)
        n_layer, prompt = len(engine.model.blk), partial(engine.decoder.prompt, 0)
        steps = {n: _median_seconds(partial(prompt, range(n), 0)) / n_layer for n in PROMPT_SIZES}
        return steps, _median_seconds(partial(_micro_batch, engine)) / n_layer


def _bundled_stream(device: torch.device, threads: int) -> float:
    """Seconds of the host for a layer of which few experts are cached; the others come in some chunks."""
    with _bundled(device, threads, experts="cache", cache_slots=STREAM_SLOTS) as engine:
        experts, router = engine.experts, engine.model.router
        assert isinstance(experts, CachedExperts)
        assert experts.prompt is not None
        layer_bytes = router.n_expert * max(layout.slot_bytes for layout in experts.layouts)
        experts.staging = experts.staging[: layer_bytes * N_CELL // STREAM_CHUNKS]
        choosers = experts.prompt.choosers
        experts.prompt = PromptExperts(experts, engine.prefill.ubatch, router.top_k, exact=True, choosers=choosers)
        return _median_seconds(partial(_micro_batch, engine)) / len(experts.layouts)


def _micro_batch(engine: Engine) -> None:
    for _ in engine.prefill.hidden(range(engine.prefill.ubatch)):
        pass
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _median_seconds(call: Call) -> float:
    """After two that compile and capture."""
    times = []
    for _ in range(2 + PROMPTS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
