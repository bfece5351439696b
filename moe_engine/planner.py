"""What goes where, and how fast it will be, before any weight is loaded: `moe-engine plan`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch

from moe_engine.budget import VramPlan, host_bytes, plan_vram
from moe_engine.calibration import Calibration
from moe_engine.config import DEFAULT_UBATCH, EngineConfig, format_size, parse_size
from moe_engine.errors import CapacityError, ConfigError
from moe_engine.loading import context_of, open_model
from moe_engine.model import n_layer
from moe_engine.model_work import ExpertLayer, ModelWork
from moe_engine.placement import Home, placed_homes, uses_slots
from moe_engine.predict import BOUND_BY, Placement, Prediction, Predictor
from moe_engine.ram_plan import RamPlan, plan_ram
from moe_engine.routing_estimate import estimate
from moe_engine.traces import Trace

PROMPTS = (512, 2048, 8192)  # tokens, for which speeds are predicted
DECODE_CONTEXT = 512  # tokens in the KV cache of the predicted decode step
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the experts in VRAM, that are tried to double a speed
ALL_FIT = 1.01  # of all experts' bytes: room for them in slots and a few staging slots
UBATCHES = (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Plan:
    """See `as_dict` for what it holds; `vram` is None where everything is on the CPU."""

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
    def placement(self) -> Placement:
        return Placement(
            shares=self._shares(self.share),
            in_ram=self._in_ram(),
            fixed=tuple(not uses_slots(home) for home in self.homes),
            ubatch=self.ubatch,
            n_sequence=self.config.n_sequence,
            ctx=self.ctx,
            fetches=self.config.exact or self.config.miss == "fetch",
            on_gpu=self.vram is not None,
        )

    def _in_ram(self) -> tuple[float, ...]:
        """By MoE layer, of experts that are not in VRAM for good; of layers placed on disk what their window holds."""
        placed, wanted = self.ram.placed_on_disk, self.ram_needed - self.ram.placed_on_disk
        window, held = self.ram.window / max(1, placed), self.in_ram / max(1, wanted)
        return tuple({"vram": 1.0, "disk": min(1.0, window)}.get(home, held) for home in self.homes)

    def _shares(self, share: float) -> tuple[float, ...]:
        """By MoE layer, with this share of the experts that are not placed."""
        return tuple({"vram": 1.0, "cpu": 0.0, "cache": share, "disk": share}[home] for home in self.homes)

    # -- how fast ----------------------------------------------------------------------------------------------

    @cached_property
    def predictor(self) -> Predictor | None:
        if self.machine is None:
            return None
        routing = estimate(self.trace, self.work.n_expert, self.work.top_k, self.config.n_sequence)
        return Predictor(self.work, self.machine, routing)

    @cached_property
    def decode(self) -> Prediction | None:
        return self._decode(self.placement)

    def _decode(self, placement: Placement) -> Prediction | None:
        return None if self.predictor is None else self.predictor.decode(placement, min(DECODE_CONTEXT, self.ctx))

    @cached_property
    def prompts(self) -> list[Prediction]:
        """Of the lengths that fit the context."""
        if self.predictor is None:
            return []
        return [self.predictor.prompt(self.placement, n) for n in PROMPTS if n <= self.ctx]

    @property
    def hit_rate(self) -> float:
        """Share of a decode step's choices that are found in VRAM, an estimate."""
        routing = estimate(self.trace, self.work.n_expert, self.work.top_k, self.config.n_sequence)
        rates = [routing.found(share).hit_rate for share in self._shares(self.share)]
        return sum(rates) / max(1, len(rates))

    def to_double(self, current: Prediction, again: Callable[[Placement], Prediction]) -> str:
        """The least change with which `again` predicts twice the speed of `current`."""
        best: tuple[float, str] | None = None
        for text, placement in self._changes:
            rate = again(placement).rate
            if rate >= 2 * current.rate:
                return f"{text}: {rate:.0f} tok/s"
            if best is None or rate > best[0]:
                best = rate, text
        if best is None or best[0] < 1.05 * current.rate:
            return f"no setting does; it takes a faster machine where the bound is: {BOUND_BY[current.binding]}"
        return f"no single setting does; {best[1]}: {best[0]:.0f} tok/s"

    @cached_property
    def _changes(self) -> list[tuple[str, Placement]]:
        """Settings to try, the cheaper ones first."""
        if self.vram is None:
            return []
        found = []
        for ubatch in UBATCHES:
            if self.ubatch < ubatch <= self.ctx and (other := self._with(ubatch=ubatch)):
                found.append((f"ubatch {ubatch}", other.placement))
        for share in SHARES if self.n_movable else ():
            if share > self.share and (other := self._with_share(share)):
                assert other.vram is not None
                cache = "experts cache, " if self.config.experts == "cpu" else ""
                text = f"{cache}vram_budget {other.vram.budget >> 20}MiB, room for {other.share:.0%} of the experts"
                found.append((text, other.placement))
        return found

    def _with(self, **changes: Any) -> Self | None:
        """The plan with other settings, None if it is impossible."""
        config = replace(self.config, **changes)
        try:
            return replace(self, config=config, vram=self.divide(config))
        except (CapacityError, ConfigError):
            return None

    def _with_share(self, share: float) -> Self | None:
        """The plan with just enough VRAM for a share of the experts; more of it also changes other terms."""
        assert self.vram is not None
        other: Self | None = self
        for _ in range(6):
            if other is None or other.vram is None or other.share >= share:
                return other
            missing = int((share - other.share) * ALL_FIT * self.movable_bytes)
            budget = other.vram.budget + max(missing, 1 << 20)
            other = self._with(vram_budget=budget >> 20 << 20, experts="cache")
        return other

    def as_dict(self) -> dict[str, Any]:
        """All of it, sizes in bytes, for JSON."""
        vram = None
        if self.vram is not None:
            left = self.vram.slots - self.slot_bytes
            vram = {"budget": self.vram.budget, **self.vram.terms, "expert slots": self.slot_bytes, "left": left}
        return {
            "file": self.path,
            "ctx": self.ctx,
            "n_sequence": self.config.n_sequence,
            "ubatch": self.ubatch,
            "vram": vram,
            "ram": {
                "experts": self.in_ram,
                "pinned": self.vram is not None and self.vram.caches_experts,
                "window": self.ram.window,
            },
            "disk": {"experts": self.on_disk},
            "experts": {"movable": self.n_movable, "in_slots": self.n_slot},
            "hit_rate": {"estimate": self.hit_rate, "from": self.hit_rate_source},
            "decode": None if self.decode is None else self.decode.as_dict(),
            "prompts": [prediction.as_dict() for prediction in self.prompts],
            "to_double": self.doubling,
        }

    @property
    def hit_rate_source(self) -> str:
        return "a recorded trace of another, small model" if self.trace is None else "the given trace"

    @property
    def doubling(self) -> dict[str, str]:
        """What to change for twice the speed."""
        predictor, context = self.predictor, min(DECODE_CONTEXT, self.ctx)
        if predictor is None or self.decode is None:
            return {}
        found = {"decode": self.to_double(self.decode, partial(predictor.decode, context=context))}
        for prompt in self.prompts:
            again = partial(predictor.prompt, n_token=prompt.tokens)
            found[f"prompt of {prompt.tokens}"] = self.to_double(prompt, again)
        return found


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
    homes = placed_homes(file, config, "cpu", n_layer(meta)) if vram is None else vram.homes
    besides = host_bytes(file, meta, family, config, ctx, device or torch.device("cpu"), vram)
    available = machine.ram_bytes if machine and elsewhere else None
    ram = plan_ram(file, meta, n_layer(meta), config, homes, besides, dense_in_ram=vram is None, available=available)
    return Plan(str(file.path), config, ctx, work, vram, ram, machine, trace, divide)


def _device(config: EngineConfig, machine: Calibration | None) -> tuple[torch.device | None, tuple[int, int] | None]:
    """Where the dense part is planned, None for the CPU; and free and total VRAM where they cannot be asked for."""
    if config.device == "cpu":
        return None, None
    if config.device == "simulated":
        return torch.device("cpu"), None
    if machine is not None:
        if machine.gpu is None and config.vram_budget is not None:
            raise ConfigError(f"vram_budget is {config.vram_budget!r}, but the machine of the hardware file has no GPU")
        if machine.gpu is None:
            return None, None
        return torch.device("cuda"), (machine.gpu.vram_bytes, machine.gpu.vram_bytes)
    if torch.cuda.is_available():
        return torch.device("cuda" if config.device == "auto" else config.device), None
    if config.vram_budget is not None:  # of some machine that is not at hand
        budget = parse_size(config.vram_budget)
        return torch.device("cuda"), (budget, budget)
    return None, None


def lines(plan: Plan) -> Sequence[tuple[str, str, str]]:
    """The report for people: part, what, value."""
    found = list[tuple[str, str, str]]()
    if plan.vram is not None:
        found.append(("VRAM", "budget", format_size(plan.vram.budget)))
        found += [("", name, format_size(nbytes)) for name, nbytes in plan.vram.terms.items()]
        of = f"{plan.n_slot} of {plan.n_movable} experts"
        found.append(("", "expert slots", f"{format_size(plan.slot_bytes)}, {of}"))
        found.append(("", "left", format_size(plan.vram.slots - plan.slot_bytes)))
    pinned = "experts, page-locked" if plan.vram is not None and plan.vram.caches_experts else "experts"
    found.append(("RAM", pinned, format_size(plan.in_ram)))
    if plan.ram.window:
        found.append(("", "window of experts on disk", format_size(plan.ram.window)))
    if plan.on_disk:
        found.append(("disk", "experts", format_size(plan.on_disk)))
    if plan.n_slot:
        found.append(("hits", "of decoding, estimate", f"{plan.hit_rate:.0%} (from {plan.hit_rate_source})"))
    rows = [(f"prompt of {prompt.tokens}", prompt) for prompt in plan.prompts]
    if plan.decode is not None:
        name = "decode" if plan.config.n_sequence == 1 else f"decode, {plan.config.n_sequence} sequences"
        rows.append((name, plan.decode))
    for i, (name, speed) in enumerate(rows):
        text = f"{speed.rate:.0f} tok/s, bound by {BOUND_BY[speed.binding]} ({_shares(speed)})"
        found.append(("" if i else "speed, estimate", name, text))
    for i, (name, text) in enumerate(plan.doubling.items()):
        found.append(("" if i else "to double it", name, text))
    return found


def _shares(speed: Prediction) -> str:
    terms = sorted(speed.terms.items(), key=lambda term: -term[1])
    return ", ".join(
        f"{name} {seconds / speed.seconds:.0%}" for name, seconds in terms if seconds > 0.01 * speed.seconds
    )
