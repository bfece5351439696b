"""What goes where, and how fast it will be, before any weight is loaded: `moe-engine plan`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moe_engine.budget import VramPlan, host_bytes, plan_vram
from moe_engine.calibration import Calibration
from moe_engine.config import DEFAULT_UBATCH, EngineConfig, parse_size
from moe_engine.errors import ConfigError
from moe_engine.loading import context_of, open_model
from moe_engine.model import n_layer
from moe_engine.model_work import ExpertLayer, ModelWork
from moe_engine.placement import Home, placed_homes, uses_slots
from moe_engine.predict import Prediction, Predictor, RunShape
from moe_engine.ram_plan import RamPlan, plan_ram
from moe_engine.routing_estimate import RoutingEstimate, estimate
from moe_engine.traces import Trace, TraceModel

PROMPTS = (512, 2048, 8192)  # tokens, for which speeds are predicted
DECODE_CONTEXT = 512  # tokens in the KV cache of the predicted decode step
AHEAD = 0.75  # of the memory for copies: the rest is still in use when copies for the next layer begin
ALL_FIT = 1.01  # of all experts' bytes: room for them in slots and a few staging slots


@dataclass(frozen=True)
class Plan:
    """What is decided and what follows from it; `vram` is None where everything is on the CPU."""

    path: str
    config: EngineConfig
    ctx: int
    work: ModelWork
    vram: VramPlan | None
    ram: RamPlan
    machine: Calibration | None  # without one there are no speeds
    trace: Trace | None  # None: the bundled recording of another model
    divide: Callable[[EngineConfig], VramPlan | None] = field(repr=False, compare=False)  # the VRAM, by other settings

    # -- what goes where ---------------------------------------------------------------------------------------

    @property
    def n_slot(self) -> int:
        """Experts that are in VRAM at a time."""
        if self.vram is None or not self.vram.caches_experts:
            return 0
        if self.vram.slots + self.vram.staging >= ALL_FIT * self.movable_bytes:  # then there is next to no staging
            return min(self.n_movable, self.config.cache_slots or self.n_movable)
        room = self.vram.slots * self.n_movable // max(1, self.movable_bytes)
        return min(self.n_movable, room, self.config.cache_slots or self.n_movable)

    @property
    def ubatch(self) -> int:
        """Tokens of a micro-batch."""
        return self.config.ubatch or DEFAULT_UBATCH if self.vram is None else self.vram.ubatch

    @property
    def n_movable(self) -> int:
        """Experts of the layers that are not placed for good."""
        return self.work.n_expert * len(self._movable)

    @property
    def movable_bytes(self) -> int:
        return self.work.n_expert * sum(layer.nbytes for layer in self._movable)

    @property
    def _movable(self) -> list[ExpertLayer]:
        placed = {} if self.vram is None else self.vram.homes
        return [layer for layer in self.work.experts if uses_slots(placed.get(layer.block, "cache"))]

    @property
    def slot_bytes(self) -> int:
        return self.n_slot * self.movable_bytes // max(1, self.n_movable)

    @property
    def share(self) -> float:
        """Of the experts of layers that are not placed: those in VRAM."""
        return self.n_slot / max(1, self.n_movable)

    @property
    def homes(self) -> list[Home]:
        """Where the experts of each MoE layer are."""
        if self.vram is None:
            return ["cpu"] * len(self.work.experts)
        found: list[Home] = [self.vram.homes.get(layer.block, "cache") for layer in self.work.experts]
        return ["cpu" if uses_slots(home) and not self.vram.caches_experts else home for home in found]

    @property
    def ram_needed(self) -> int:
        """Bytes of experts that are not in VRAM for good."""
        return self.work.expert_bytes - (0 if self.vram is None else self.vram.placed)

    @property
    def in_ram(self) -> int:
        """Bytes of experts, page-locked where they are copied to a GPU; without those that only pass through."""
        wanted = self.ram_needed - self.ram.placed_on_disk
        return wanted if self.ram.limit is None else min(wanted, self.ram.limit)

    @property
    def on_disk(self) -> int:
        """Bytes of experts that the RAM does not hold."""
        return self.ram_needed - self.in_ram

    @property
    def run_shape(self) -> RunShape:
        return RunShape(
            shares=self._shares(),
            in_ram=self._in_ram(),
            fixed=tuple(not uses_slots(home) for home in self.homes),
            ubatch=self.ubatch,
            n_sequence=self.config.n_sequence,
            ctx=self.ctx,
            fetches=self.config.exact or self.config.miss == "fetch",
            on_gpu=self.vram is not None,
            staging=math.inf if self.vram is None or self.config.exact else AHEAD * self.vram.staging,
        )

    def _in_ram(self) -> tuple[float, ...]:
        """By MoE layer, of experts that are not in VRAM for good; of layers placed on disk what their window holds."""
        placed, wanted = self.ram.placed_on_disk, self.ram_needed - self.ram.placed_on_disk
        window, held = self.ram.window / max(1, placed), self.in_ram / max(1, wanted)
        return tuple({"vram": 1.0, "disk": min(1.0, window)}.get(home, held) for home in self.homes)

    def _shares(self) -> tuple[float, ...]:
        """By MoE layer, of its experts those in VRAM."""
        share = {"vram": 1.0, "cpu": 0.0, "cache": self.share, "disk": self.share}
        return tuple(share[home] for home in self.homes)

    # -- how fast ----------------------------------------------------------------------------------------------

    @cached_property
    def routing(self) -> RoutingEstimate:
        return estimate(self.trace, self.work.n_expert, self.work.top_k, self.config.n_sequence)

    @cached_property
    def predictor(self) -> Predictor | None:
        return None if self.machine is None else Predictor(self.work, self.machine, self.routing)

    @property
    def decode_context(self) -> int:
        """Tokens in the KV cache of the predicted decode step."""
        return min(DECODE_CONTEXT, self.ctx)

    @cached_property
    def decode(self) -> Prediction | None:
        return None if self.predictor is None else self.predictor.decode(self.run_shape, self.decode_context)

    @cached_property
    def prompts(self) -> list[Prediction]:
        """Of the lengths that fit the context."""
        if self.predictor is None:
            return []
        return [self.predictor.prompt(self.run_shape, n) for n in PROMPTS if n <= self.ctx]

    @property
    def hit_rate(self) -> float:
        """Share of a decode step's choices that are found in VRAM, an estimate."""
        rates = [self.routing.found(share).hit_rate for share in self._shares()]
        return sum(rates) / max(1, len(rates))


def plan(
    path: str | Path | None = None,
    *,
    machine: Calibration | None = None,
    elsewhere: bool = False,
    trace: Trace | None = None,
    **options: Any,
) -> Plan:
    """Plans for a file; without a path, the bundled model. Only its header is read.

    machine: speeds are predicted for it. elsewhere: it is not this machine, so its VRAM and RAM count. options: the
    fields of `EngineConfig`. Raises as `Engine.load`.
    """
    config = EngineConfig.of(**options)
    file, meta, family = open_model(path)
    ctx = context_of(config, meta)
    device, memory = _device(config, machine if elsewhere else None)

    def divide(config: EngineConfig) -> VramPlan | None:
        return None if device is None else plan_vram(file, meta, family, config, ctx, device, memory)

    work, vram = ModelWork.of(file, meta, family, config.kv_dtype), divide(config)
    if trace is not None:
        require_same_shape(work, trace.model, str(file.path))
    homes = placed_homes(file, config, "cpu", n_layer(meta)) if vram is None else vram.homes
    besides = host_bytes(file, meta, family, config, ctx, device or torch.device("cpu"), vram)
    available = machine.ram_bytes if machine and elsewhere else None
    ram = plan_ram(file, meta, n_layer(meta), config, homes, besides, dense_in_ram=vram is None, available=available)
    return Plan(str(file.path), config, ctx, work, vram, ram, machine, trace, divide)


def require_same_shape(work: ModelWork, recorded: TraceModel, source: str) -> None:
    """Raises `ConfigError` if a trace is not of a model of this shape."""
    has = len(work.experts), work.top_k, work.n_expert
    given = recorded.n_layer, recorded.top_k, recorded.n_expert
    if has != given:
        texts = ["{} MoE layers with {} of {} experts a token".format(*shape) for shape in (given, has)]
        raise ConfigError(f"the trace is of {texts[0]}, but {source} has {texts[1]}")


def _device(config: EngineConfig, machine: Calibration | None) -> tuple[torch.device | None, tuple[int, int] | None]:
    """Where the dense part is planned, None for the CPU; and free and total VRAM where they cannot be asked for."""
    if config.device == "cpu":
        return None, None
    if config.device == "simulated":
        return torch.device("cpu"), None
    if machine is not None:
        if machine.gpu is None and config.vram_budget is not None:
            raise ConfigError(f"vram_budget is {config.vram_budget!r}, but the machine of the hardware file has no GPU")
        if machine.gpu is None and config.device != "auto":
            raise ConfigError(f"device is {config.device!r}, but the machine of the hardware file has no GPU")
        if machine.gpu is None:
            return None, None
        return torch.device("cuda"), (machine.gpu.vram_bytes, machine.gpu.vram_bytes)
    if torch.cuda.is_available():
        return torch.device("cuda" if config.device == "auto" else config.device), None
    if config.vram_budget is not None:  # of some machine that is not at hand
        budget = parse_size(config.vram_budget)
        return torch.device("cuda"), (budget, budget)
    if config.device != "auto":
        raise ConfigError(
            f"device is {config.device!r}, but there is no CUDA device: give a vram_budget, or the hardware file of a "
            "machine that has one"
        )
    return None, None
