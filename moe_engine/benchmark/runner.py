"""Runs contenders in turns and makes a result row of each test. `Ours` is the engine; peers.py has other programs."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from moe_engine.backend import choose_device
from moe_engine.benchmark import timeline
from moe_engine.benchmark.environment import Environment, ModelFacts, gpu_id, vram_in_use
from moe_engine.benchmark.plan import Load, Test, snake
from moe_engine.benchmark.results import (
    Limit,
    Row,
    Sample,
    decode_costs,
    decode_limit,
    limits,
    slowest,
    timing,
)
from moe_engine.benchmark.routing import load_trace, replayed
from moe_engine.config import EngineConfig
from moe_engine.decoder import GraphDecoder
from moe_engine.engine import Engine, Result
from moe_engine.errors import ConfigError
from moe_engine.expert_cache import CachedExperts
from moe_engine.hardware import Hardware, measure
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.traces import Trace

# Text as the model itself would write it. All contenders and repetitions that can, draw alike.
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "repeat_penalty": 1.0, "ignore_eos": True}
FEW_TOKENS = 8  # choices per expert below which a prompt need not touch every expert


class Contender(Protocol):
    """Something whose speed is measured. Between `open` and `close` it holds the machine's memory."""

    name: str

    def open(self, tests: Sequence[Test]) -> None:
        """Loads, and warms up."""
        ...

    def run(self, test: Test, repetition: int) -> Sample: ...

    def close(self) -> None: ...

    def row(self, test: Test, samples: Sequence[Sample]) -> Row:
        """What is to be said beside the times. The contender has been closed."""
        ...


def run(
    contenders: Sequence[Contender],
    tests: Sequence[Test],
    repetitions: int,
    progress: Callable[[str], None] = lambda done: None,
) -> list[Row]:
    """A row for each contender and test. progress: called with what was just measured.

    Ctrl-C ends with the rows of what has been measured so far, if that is anything.
    """
    samples: dict[tuple[int, Test], list[Sample]] = {}
    held: Contender | None = None
    try:
        for repetition, (index, contender) in snake(list(enumerate(contenders)), repetitions):
            if contender is not held:
                if held is not None:
                    held.close()
                held = contender
                contender.open(tests)
            for test in reversed(tests) if repetition % 2 else tests:
                samples.setdefault((index, test), []).append(contender.run(test, repetition))
                progress(f"{contender.name} {test.name}")
    except KeyboardInterrupt:
        if not samples:
            raise
    finally:
        if held is not None:
            held.close()
    rows = []
    for index, contender in enumerate(contenders):
        for test in tests:
            if found := samples.get((index, test)):
                rows.append({**contender.row(test, found), **timing(test, found)})
    return rows


class Machine:
    """What is measured once: the memories, the arithmetic, and how much VRAM others use."""

    def __init__(self, config: EngineConfig) -> None:
        self.gpu = gpu_id(config.device)
        self.vram_of_others = vram_in_use(self.gpu)  # before this process takes any
        self.device, self.accelerated = choose_device(config.device)
        self.hardware: Hardware = measure(self.device, CpuKernels(config.n_threads))
        self.matmul_rate = _matmul_rate(self.device) if self.device.type == "cuda" else 0.0

    def environment(self, arguments: Sequence[str]) -> Environment:
        return Environment.find(arguments, self.device, self.gpu, self.hardware)

    def vram_peak(self) -> int:
        """Bytes that this process has held at most since its engine was loaded: what it holds, and what PyTorch has
        held beyond that. 0 without a GPU."""
        if self.device.type != "cuda":
            return 0
        beyond = torch.cuda.max_memory_reserved(self.device) - torch.cuda.memory_reserved(self.device)
        return max(0, vram_in_use(self.gpu) - self.vram_of_others) + beyond


class Ours:
    """The engine on a file, loaded in one way.

    routing: a trace whose choices are followed in decoding. with_timeline: rows of generated tokens get the events of
    a step. progress: see `Engine.load`.
    """

    def __init__(
        self,
        path: Path,
        load: Load,
        machine: Machine,
        *,
        routing: Path | None = None,
        with_timeline: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path, self.load, self.machine = path, load, machine
        self.routing = None if routing is None else load_trace(routing)
        self.routing_name = "own" if routing is None else f"recorded, {routing.name}"
        self.with_timeline, self.progress = with_timeline, progress
        self.name = load.name or "moe_engine"
        self.facts = ModelFacts.of(path)
        self.peak_vram = self.peak_ram = 0
        self.load_seconds = 0.0
        self._engine: Engine | None = None
        self._slots: Row = {}
        self._n_sequence = 1
        self._missing_bytes = self._dense_bytes = 0
        self._token_bytes = 0.0
        self._events: list[timeline.Event] = []
        self.config = EngineConfig()

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def open(self, tests: Sequence[Test]) -> None:
        reset_peak_ram()
        options = engine_options(self.path, self.load, max(test.n_ctx for test in tests))
        started = time.perf_counter()
        self._engine = engine = Engine.load(self.path, progress=self.progress, **options)
        self.load_seconds = time.perf_counter() - started
        self.config, self._n_sequence = engine.config, engine.cache.n_sequence
        engine.__dict__["hardware"] = self.machine.hardware  # in place of a measurement of its own
        if self.routing is not None:
            self._follow(self.routing)
        self._note_slots()
        if self.with_timeline and not self._events:
            self._warm_up(tests)
            self._events = timeline.record(engine, self._tokens(0, 0, 1)[0])
        self._warm_up(tests)

    def _warm_up(self, tests: Sequence[Test]) -> None:
        """On a GPU, kernels compile, the graph is captured and the cache fills; a CPU needs less."""
        for test in tests:
            few = Test(min(test.n_prompt, 32), min(test.n_gen, 4))
            self.run(test if self.machine.accelerated else few, -1)

    def _follow(self, trace: Trace) -> None:
        decoder = self.engine.decoder
        if not isinstance(decoder, GraphDecoder):
            raise ConfigError("--routing needs the decode path of a GPU: it cannot be used with device 'cpu' or eager")
        n_layer, n_expert = decoder.step.experts.slot_table.shape
        top_k = self.engine.model.router.top_k
        decoder.step.replay = replayed(trace, n_layer, n_expert, top_k).to(self.engine.device)

    def _note_slots(self) -> None:
        engine, experts = self.engine, self.engine.experts
        self._dense_bytes, self._token_bytes = engine.dense_bytes, engine.cache.token_bytes
        held, n_slot, n_expert = 0, 0, self.facts.n_expert * max(1, self._n_moe_layer())
        if isinstance(experts, CachedExperts):
            held = sum(pool.slots.numel() for pool in experts.pools.values())
            n_slot = experts.n_slot
        self._missing_bytes = max(0, self.facts.routed_bytes - held)
        budget = engine.vram_plan.budget if engine.vram_plan else None
        self._slots = {"n_slot": n_slot, "cached_share": n_slot / n_expert, "vram_budget": budget}

    def _n_moe_layer(self) -> int:
        return sum(name.endswith("ffn_gate_inp.weight") for name in self.engine.file.tensors)

    def run(self, test: Test, repetition: int) -> Sample:
        """Fills the context, untimed, then takes the time. What fills it is kept from one test to the next."""
        tokens = [self._tokens(index, repetition + 1, test.n_ctx) for index in range(self._n_sequence)]
        self._generate([ids[: test.n_depth + 1] for ids in tokens], 0, repetition)
        self._synchronize()
        started = time.perf_counter()
        result = self._generate([ids[: test.n_depth + test.n_prompt + 1] for ids in tokens], test.n_gen, repetition)
        self._synchronize()
        seconds = time.perf_counter() - started
        if not test.n_prompt:
            seconds = result.stats.decode_seconds  # begins behind the (empty) prompt
        return Sample(seconds, test.n_token * self._n_sequence, result.stats)

    def _generate(self, prompts: list[list[int]], n_gen: int, repetition: int) -> Result:
        return self.engine.generate_batch(prompts, max_tokens=n_gen, seed=repetition + 1, **SAMPLING)[0]

    def _tokens(self, sequence: int, seed: int, count: int) -> list[int]:
        """Random ones, as llama-bench takes them; the first sequence begins as a text does."""
        tokenizer = self.engine.tokenizer
        ids: list[int] = np.random.default_rng([sequence, seed]).integers(tokenizer.n_vocab, size=count).tolist()
        if sequence == 0 and tokenizer.bos_id is not None:
            ids[0] = tokenizer.bos_id
        return ids

    def _synchronize(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)

    def close(self) -> None:
        if self._engine is None:
            return
        engine, self._engine = self._engine, None
        self.peak_vram = max(self.peak_vram, self.machine.vram_peak())
        self.peak_ram = max(self.peak_ram, peak_ram())
        engine.close()

    def row(self, test: Test, samples: Sequence[Sample]) -> Row:
        config, costs = self.config, decode_costs(samples)
        avg_ts = float(np.mean([sample.n_token / sample.seconds for sample in samples]))
        row = {
            "engine": "moe_engine",
            "backends": "CUDA" if self.machine.device.type == "cuda" else "CPU",
            **{name: getattr(self.facts, name) for name in MODEL_FIELDS},
            "n_batch": config.ubatch,
            "n_ubatch": config.ubatch,
            "n_threads": config.n_threads,
            "type_k": config.kv_dtype,
            "type_v": config.kv_dtype,
            "n_sequence": self._n_sequence,
            "routing": self.routing_name,
            "options": dict(self.load.options),
            "varied": list(self.load.varied),
            **self._slots,
            **costs,
            **limits(self._limit(test, samples), avg_ts),
            "peak_vram": self.peak_vram or None,
            "peak_ram": self.peak_ram,
            "load_seconds": self.load_seconds,
        }
        if self._events and test.n_gen and not test.n_prompt:
            row["timeline"] = timeline.packed(self._events)
        return row

    def _limit(self, test: Test, samples: Sequence[Sample]) -> Limit | None:
        """Decoding: what is read (see `hardware.Bound`); on the CPU alone, every weight of a token from RAM. Prompts on
        a GPU: the products' arithmetic, and every expert that is in no slot crossing the bus once."""
        machine, n_token = self.machine, test.n_token * self._n_sequence
        if test.n_prompt and test.n_gen:
            return None
        if test.n_gen and not machine.accelerated:
            read = self._dense_bytes + self.facts.active_bytes + (test.n_depth + test.n_gen / 2) * self._token_bytes
            return slowest(1, {"RAM": read / machine.hardware.dram})
        if test.n_gen:
            return decode_limit(samples)
        if not machine.matmul_rate:
            return None
        touches_all = n_token * self.facts.top_k >= FEW_TOKENS * self.facts.n_expert
        bus = self._missing_bytes / machine.hardware.pcie if touches_all else 0.0
        arithmetic = 2 * self.facts.active_params * n_token / machine.matmul_rate
        return slowest(n_token, {"arithmetic": arithmetic, "PCIe": bus})


MODEL_FIELDS = ("model_filename", "model_type", "model_size", "model_n_params", "model_fingerprint")


def engine_options(path: Path, load: Load, n_ctx: int) -> dict[str, Any]:
    """Options of `Engine.load`, a share of the experts (`vram_budget` "25%") turned into bytes.

    0 %: all experts stay on the CPU. Raises `ConfigError`, `CapacityError`.
    """
    options = {"ctx": n_ctx, **dict(load.options)}
    budget = options.get("vram_budget")
    if not isinstance(budget, str) or not budget.endswith("%"):
        return options
    try:
        share = float(budget[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"vram_budget is {budget!r}, expected a size such as 6GiB or a share of the experts (25%)")
    options.pop("vram_budget")
    options.setdefault("experts", "cache" if share else "cpu")
    facts, without = ModelFacts.of(path), Engine.plan(path, **options)
    room = int(share * facts.routed_bytes) + 2 * sum(facts.expert_bytes)
    return {**options, "vram_budget": without.budget - without.slots + room}


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
