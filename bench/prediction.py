"""What `moe-engine plan` predicts for a measured row, with the calibration that this machine keeps."""

import statistics
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
from moe_engine.planner import DECODE_CONTEXT, plan
from moe_engine.routing_estimate import Found, RoutingEstimate, bundled_trace

ROUNDS = 15  # of calls with all of the experts: some tenths of a second with 16 threads


@dataclass(frozen=True)
class Used:
    """Experts of a layer that a prompt has used, on average, how many of them were in slots, and the engine's way."""

    n: float
    cached: float
    in_steps: bool


class FewerUsed(RoutingEstimate):
    """As many experts of each layer as a prompt has used, some with more tokens than others as recorded routing has
    them."""

    def __init__(self, n_used: int) -> None:
        super().__init__(bundled_trace())
        self.n_used = n_used

    def counts(self, n_token: int, n_expert: int, top_k: int) -> list[int]:
        most = sorted(super().counts(n_token, n_expert, top_k), reverse=True)[: self.n_used]
        most += [1] * (self.n_used - len(most))
        return [max(1, round(n * n_token * top_k / sum(most))) for n in most]


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
    """How long the host takes to launch a layer of a prompt around rows, by the calibrated: on shared machines it is
    slower by half for seconds, time and again.

    path: of `large_layers`.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        self._last = self._seconds()

    def _seconds(self) -> float:
        return prompt_layer_seconds(self._path, self._device, EngineConfig().n_threads)

    def around(self, machine: Calibration) -> float:
        """The faster of now and of the last call, which was behind the last row: it is rarely slow all the time."""
        before, self._last = self._last, self._seconds()
        return min(before, self._last) / machine.gpu.layer_seconds if machine.gpu is not None else 1.0


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
    decode: float | None = None,
    prompts: dict[int, float] | None = None,
    used: dict[int, Used] | None = None,
    host: HostNow | None = None,
    hit_rate: float | None = None,
    found: Sequence[Found] | None = None,
    context: int = DECODE_CONTEXT,
    **options: Any,
) -> dict[str, Any] | None:
    """Predicted tokens/s, and by what the prediction has to be divided for the measured: None without a calibration.

    cpu, host: what was begun before the row: by it the machine is corrected; host only matters for prompts.
    decode, prompts (by tokens): measured tokens/s. hit_rate: of decoding where routing is not as recorded; None: as the
    planner expects it. found: the same by MoE layer. used: of prompts by tokens, likewise.
    options: as the row was loaded.
    """
    machine = this_machine(options.get("device", "auto"), EngineConfig.of(**options).n_threads)
    if machine is None:
        print("  no prediction: run moe-engine calibrate first", flush=True)
        return None
    factors = cpu.around(machine), host.around(machine) if host is not None else 1.0
    planned = plan(path, machine=at_speed(machine, *factors), **options)
    predictor, shape = planned.predictor, planned.run_shape
    assert predictor is not None
    result: dict[str, Any] = {"hit_rate": planned.hit_rate, "cpu_factor": factors[0], "host_factor": factors[1]}
    if decode is not None:
        if hit_rate is not None:
            n = len(shape.shares)
            shape = replace(shape, shares=(hit_rate,) * n, fixed=(True,) * n)
        step = predictor.decode(shape, context, found)
        result["decode"] = {**step.as_dict(), "to_measured": step.rate / decode}
    for n_token, measured in (prompts or {}).items():
        prompt = predictor.prompt(planned.run_shape, n_token)
        if used and n_token in used:
            of = used[n_token]
            shape = replace(planned.run_shape, shares=(of.cached / of.n,) * len(planned.run_shape.shares))
            of_use = replace(predictor, routing=FewerUsed(round(of.n)))
            # The engine, which chooses, does not know how few experts random weights use.
            prompt = (of_use.in_steps if of.in_steps else of_use.streamed)(shape, n_token)
        result[f"prompt {n_token}"] = {**prompt.as_dict(), "to_measured": prompt.rate / measured}
    for name, speed in result.items():
        if name not in ("hit_rate", "cpu_factor", "host_factor"):
            print(f"  predicted {name}: {speed['tokens_per_second']:.1f} tok/s, {speed['to_measured']:.2f} of measured")
    return result
