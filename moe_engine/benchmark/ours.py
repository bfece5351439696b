"""The engine as a contender: loaded in one way, timed, and what its statistics say of a test."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_engine.benchmark import timeline
from moe_engine.benchmark.environment import ModelFacts
from moe_engine.benchmark.machine import Machine, peak_ram, reset_peak_ram
from moe_engine.benchmark.plan import Load, Test
from moe_engine.benchmark.results import (
    Limit,
    Row,
    Sample,
    decode_costs,
    decode_limit,
    limits,
    missing_bytes,
    prompt_costs,
    slowest,
)
from moe_engine.benchmark.routing import RecordedRouting
from moe_engine.config import EngineConfig
from moe_engine.engine import Engine
from moe_engine.errors import ConfigError
from moe_engine.expert_cache import CachedExperts
from moe_engine.generation import Result
from moe_engine.graph_decoder import GraphDecoder

MODEL_FIELDS = ("model_filename", "model_type", "model_size", "model_n_params", "model_fingerprint")

# Text as the model itself would write it. All contenders and repetitions that can, draw alike.
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "repeat_penalty": 1.0, "ignore_eos": True}
AMPLE = 1 << 37  # bytes: a budget to begin with
PLANS = 32  # tries to find the budget of a share of the experts


class Ours:
    """The engine on a file, loaded in one way.

    routing: a recording whose choices are followed in decoding. with_timeline: rows of generated tokens get the events
    of a step.
    """

    def __init__(
        self,
        path: Path,
        facts: ModelFacts,
        load: Load,
        machine: Machine,
        *,
        routing: Path | None = None,
        with_timeline: bool = False,
    ) -> None:
        self.path, self.facts, self.load, self.machine = path, facts, load, machine
        self.routing = None if routing is None else RecordedRouting.load(routing)
        self.routing_name = "own" if routing is None else f"recorded, {routing.name}"
        self.with_timeline = with_timeline
        self.name = load.name or "moe_engine"
        self.peak_vram = self.peak_ram = 0
        self.load_seconds = 0.0
        self._engine: Engine | None = None
        self._slots: Row = {}
        self._n_sequence = 1
        self._dense_bytes = 0
        self._token_bytes = 0.0
        self._events: list[timeline.Event] = []
        self.config, self.ubatch = EngineConfig(), 0

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def open(self, tests: Sequence[Test]) -> None:
        reset_peak_ram()
        options = engine_options(self.path, self.facts, self.load, max(test.n_ctx for test in tests))
        if options.get("vram_budget") is not None and not self.machine.accelerated:
            raise ConfigError(
                f"vram_budget is '{options['vram_budget']}', but device '{self.machine.device}' has no VRAM"
            )
        started = time.perf_counter()
        self._engine = engine = Engine.load(self.path, **options)
        self.load_seconds = time.perf_counter() - started
        self.config, self.ubatch, self._n_sequence = engine.config, engine.prefill.ubatch, engine.cache.n_sequence
        engine.__dict__["hardware"] = self.machine.hardware  # in place of a measurement of its own
        if self.routing is not None:
            self._follow(self.routing)
        self._note_slots()
        if isinstance(engine.decoder, GraphDecoder):
            engine.decoder.worker.settle()  # all slots are filled
        if isinstance(engine.experts, CachedExperts):
            while engine.experts.store.is_locking:  # meanwhile launches wait for the driver
                time.sleep(0.05)
        if self.with_timeline and not self._events:
            self._warm_up(tests)
            self._events = timeline.record(engine, self._tokens(0, 0, 1)[0])
        self._warm_up(tests)

    def _warm_up(self, tests: Sequence[Test]) -> None:
        """On a GPU, kernels compile, the graph is captured and the cache fills; a CPU needs less."""
        for test in tests:
            few = Test(min(test.n_prompt, 32), min(test.n_gen, 4))
            self.run(test if self.machine.accelerated else few, -1)

    def _follow(self, routing: RecordedRouting) -> None:
        decoder = self.engine.decoder
        if not isinstance(decoder, GraphDecoder):
            raise ConfigError("--routing needs the decode path of a GPU: it cannot be used with device 'cpu' or eager")
        routing.follow(decoder.step)

    def _note_slots(self) -> None:
        engine, experts = self.engine, self.engine.experts
        self._dense_bytes, self._token_bytes = engine.dense_bytes, engine.cache.token_bytes
        n_slot = experts.n_slot if isinstance(experts, CachedExperts) else 0
        n_expert = self.facts.n_expert * max(1, self._n_moe_layer())
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
        return Sample(seconds, test.n_token * self._n_sequence, result.stats, result.stats.prompt_experts)

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
        config, costs = self.config, decode_costs(samples) if test.n_gen else prompt_costs(samples)
        avg_ts = float(np.mean([sample.n_token / sample.seconds for sample in samples]))
        row = {
            "engine": "moe_engine",
            "backends": "CUDA" if self.machine.device.type == "cuda" else "CPU",
            **{name: getattr(self.facts, name) for name in MODEL_FIELDS},
            "n_batch": self.ubatch,
            "n_ubatch": self.ubatch,
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
        a GPU: the products' arithmetic, and every expert that is used and in no slot crossing the bus once."""
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
        n_pass = self._n_sequence * -(-test.n_prompt // max(1, self.ubatch))
        bus = missing_bytes(samples) / n_pass / machine.hardware.pcie
        arithmetic = 2 * self.facts.active_params * n_token / machine.matmul_rate
        return slowest(n_token, {"arithmetic": arithmetic, "PCIe": bus})


def engine_options(path: Path, facts: ModelFacts, load: Load, n_ctx: int) -> dict[str, Any]:
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
    room = int(share * facts.routed_bytes) + 2 * sum(facts.expert_bytes)
    ample = {"vram_budget": AMPLE} if options.get("device") == "simulated" else {}  # elsewhere: what is free
    plan = Engine.plan(path, **options, **ample)
    for _ in range(PLANS):  # the rest of the budget depends on it, in steps
        if abs(plan.slots - room) < 1024:
            break
        plan = Engine.plan(path, vram_budget=plan.budget - plan.slots + room, **options)
    return {**options, "vram_budget": plan.budget}
