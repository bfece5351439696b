"""What `moe-engine plan` predicts for a measured row, with the calibration that this machine keeps."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_engine.calibrate import ExpertCalls, expert_memory
from moe_engine.calibrate_gpu import prompt_layer_seconds
from moe_engine.calibration import Calibration, this_machine
from moe_engine.config import EngineConfig
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kernels.norm_rope import fused_rms_norm
from moe_engine.planner import DECODE_CONTEXT, plan
from moe_engine.routing_estimate import Found, RoutingEstimate, bundled_trace

ROUNDS = 15  # of calls with all of the experts: some tenths of a second with 16 threads
HOST_ROUNDS, LAUNCHES = 3, 100


@dataclass(frozen=True)
class Used:
    """Experts of a layer that a prompt has used, on average, and how many of them were in slots.

    counts: tokens of each, most first, of a prompt that was streamed; None: it went in steps.
    """

    n: float
    cached: float
    counts: tuple[int, ...] | None

    def as_dict(self) -> dict[str, object]:
        counts = None if self.counts is None else " ".join(map(str, self.counts))
        return {"n": self.n, "cached": self.cached, "counts": counts}


@dataclass(frozen=True)
class SeenPrompt:
    """Measured tokens/s, the experts it has used, and what launches took around it: seconds as of `HostNow`."""

    rate: float
    used: Used
    launches: float


class Seen(RoutingEstimate):
    """As many experts of each layer as a prompt has used, with as many tokens as it was seen to give them."""

    def __init__(self, used: Used) -> None:
        super().__init__(bundled_trace())
        self.used = used

    def counts(self, n_token: int, n_expert: int, top_k: int) -> list[int]:
        return [1] * round(self.used.n) if self.used.counts is None else list(self.used.counts)


class CpuNow:
    """How fast the CPU's experts are around rows, by the calibrated: on shared machines RAM changes by the minute."""

    def __init__(self) -> None:
        self._calls = ExpertCalls(CpuKernels(EngineConfig().n_threads), "Q4_K", expert_memory())
        self._last = self._seconds()

    def _seconds(self) -> float:
        return statistics.median(self._calls.seconds() for _ in range(ROUNDS))

    def around(self, machine: Calibration) -> float:
        """Of now and of the last call, which was behind the last row."""
        before, self._last = self._last, self._seconds()
        product = machine.cpu_experts["Q4_K"].seconds(self._calls.nbytes, self._calls.operations)
        return (product + machine.cpu_call_seconds) / statistics.mean((before, self._last))


class HostNow:
    """How fast the host launches kernels, by the calibrated: on shared machines it is slower by half for seconds, time
    and again, so it has to be known of the moment.

    path: of `large_layers`.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._x, self._weight = torch.ones(16, 512, device=device), torch.ones(512, device=device)
        self.seconds()  # compiles
        rounds = []
        for _ in range(HOST_ROUNDS):
            before = self.seconds()
            layer = prompt_layer_seconds(path, device, EngineConfig().n_threads)
            rounds.append(2 * layer / (before + self.seconds()))
        self._layers = statistics.median(rounds)  # that are launched in the time of `seconds`

    def seconds(self) -> float:
        """What some launches take now, a few milliseconds."""
        started = time.perf_counter()
        for _ in range(LAUNCHES):
            torch.add(self._x, fused_rms_norm(self._x, self._weight, 1e-6))
        found = time.perf_counter() - started
        torch.cuda.synchronize()
        return found

    def factor(self, seconds: float, machine: Calibration) -> float:
        """Of the host's work, while launches took so long, by the calibrated."""
        return seconds * self._layers / machine.gpu.layer_seconds if machine.gpu is not None else 1.0


def at_speed(machine: Calibration, cpu: float, host: float = 1.0) -> Calibration:
    """The machine while it reads faster from RAM, or slower, and launches take longer."""
    experts = {t: replace(product, weights=product.weights * cpu) for t, product in machine.cpu_experts.items()}
    gpu = machine.gpu
    if gpu is not None:
        gpu = replace(gpu, layer_seconds=gpu.layer_seconds * host, chunk_seconds=gpu.chunk_seconds * host)
    return replace(machine, dram={n: rate * cpu for n, rate in machine.dram.items()}, cpu_experts=experts, gpu=gpu)


def predicted(
    path: Path,
    *,
    cpu: CpuNow,
    host: HostNow | None = None,
    decode: float | None = None,
    prompts: dict[int, SeenPrompt] | None = None,
    hit_rate: float | None = None,
    found: Sequence[Found] | None = None,
    context: int = DECODE_CONTEXT,
    **options: Any,
) -> dict[str, Any] | None:
    """Predicted tokens/s, and by what the prediction has to be divided for the measured: None without a calibration.

    cpu, host: what was begun before the row: by it the machine is corrected; host only matters for prompts.
    decode: measured tokens/s. hit_rate: of decoding where routing is not as recorded; None: as the planner expects it.
    found: the same by MoE layer. prompts: by tokens. options: as the row was loaded.
    """
    machine = this_machine(options.get("device", "auto"), EngineConfig.of(**options).n_threads)
    if machine is None:
        print("  no prediction: run moe-engine calibrate first", flush=True)
        return None
    factor = cpu.around(machine)
    planned = plan(path, machine=at_speed(machine, factor), **options)
    predictor, shape = planned.predictor, planned.run_shape
    assert predictor is not None
    result: dict[str, Any] = {"hit_rate": planned.hit_rate, "cpu_factor": factor}
    if decode is not None:
        if hit_rate is not None:
            n = len(shape.shares)
            shape = replace(shape, shares=(hit_rate,) * n, fixed=(True,) * n)
        step = predictor.decode(shape, context, found)
        result["decode"] = {**step.as_dict(), "to_measured": step.rate / decode}
    for n_token, seen in (prompts or {}).items():
        slower = host.factor(seen.launches, machine) if host is not None else 1.0
        # The engine, which chooses the way, does not know how few experts random weights use.
        as_seen = replace(predictor, machine=at_speed(machine, factor, slower), routing=Seen(seen.used))
        way = as_seen.in_steps if seen.used.counts is None else as_seen.streamed
        n = len(planned.run_shape.shares)
        prompt = way(replace(planned.run_shape, shares=(seen.used.cached / seen.used.n,) * n), n_token)
        speed = {**prompt.as_dict(), "to_measured": prompt.rate / seen.rate, "host_factor": slower}
        result[f"prompt {n_token}"] = speed
    for name, speed in result.items():
        if name not in ("hit_rate", "cpu_factor"):
            print(f"  predicted {name}: {speed['tokens_per_second']:.1f} tok/s, {speed['to_measured']:.2f} of measured")
    return result
