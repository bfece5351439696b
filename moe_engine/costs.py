"""How long decode steps and layers of prompts take, from bytes, operations and rates: plain arithmetic.

A decode step: the GPU reads dense weights, keys and values, and the experts in slots, while the CPU reads those that
are in none. A layer of a prompt: experts that are in no slot come over the bus, few-token ones go to the CPU instead
(prompt_split.py decides which, here as in the engine), and the GPU multiplies meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_engine.prompt_split import Rates, choose_for_cpu, cpu_seconds


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one decode step, by what they are spent on.

    Of hits that the GPU computes beside misses, and these, the shorter costs nothing.
    """

    kernels: float  # the fixed part of what is launched
    reads: float  # from VRAM: dense weights, keys and values, hits of layers in which nothing is missed
    hits: float  # of layers in which something is missed
    misses: float  # read by the CPU, or copied
    exchange: float  # messages between GPU and CPU

    @property
    def terms(self) -> dict[str, float]:
        """What the step takes is the sum of these."""
        terms = {"kernels": self.kernels, "reads": self.reads}
        if self.hits >= self.misses + self.exchange:
            return terms | {"hits": self.hits}
        return terms | {"misses": self.misses, "exchange": self.exchange}

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())


def miss_seconds(miss_bytes: float, fetch_bytes: float, *, cpu: float, ram: float) -> float:
    """Misses of a decode step that the CPU computes at `cpu` bytes per second, while copies for later steps read
    `fetch_bytes` from the same RAM, which delivers `ram` to both."""
    return max(miss_bytes / cpu, (miss_bytes + fetch_bytes) / ram)


@dataclass(frozen=True)
class PromptLayer:
    """What a layer of a prompt's micro-batch consists of.

    missing, cached: tokens of each expert that has some, in no slot and in one. nbytes, operations: of one expert, and
    of one token with it. dense: seconds of attention and all else that is no routed expert; gpu_expert, gpu_token: of
    one expert's weights and of a token with it, on the GPU; launches: of the host, to start it all.
    """

    missing: Sequence[int]
    cached: Sequence[int]
    nbytes: int
    operations: int
    dense: float
    gpu_expert: float
    gpu_token: float
    launches: float

    def gpu_seconds(self, counts: Sequence[int]) -> float:
        """With experts of so many tokens each on the GPU."""
        return self.dense + len(counts) * self.gpu_expert + sum(counts) * self.gpu_token


def layer_terms(layer: PromptLayer, rates: Rates) -> dict[str, float]:
    """Seconds by resource; the layer takes as long as the longest, because copies run beside everything else.

    GPU and host take turns: the host waits for the router's choice, then the GPU for what the host launches.
    """
    counts = sorted(layer.missing)
    n_cpu = choose_for_cpu(counts, sum(layer.cached), layer.nbytes, layer.operations, rates)
    on_gpu = [*layer.cached, *counts[n_cpu:]]
    missing = (len(counts) - n_cpu) * layer.nbytes / rates.pcie
    if n_cpu:
        each = (cpu_seconds(n, layer.nbytes, layer.operations, rates) for n in counts[:n_cpu])
        missing = max(missing, layer.dense + sum(each) + rates.hand_over)
    gpu = layer.gpu_seconds(on_gpu)
    return {"misses": missing, "gpu" if gpu > layer.launches else "launches": gpu + layer.launches}
