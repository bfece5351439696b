"""How long decode steps and layers of prompts take, from bytes, operations and rates: plain arithmetic.

A decode step: the GPU reads dense weights, keys and values, and the experts in slots, while the CPU reads those that
are in none. A layer of a prompt: experts that are in no slot come over the bus, and the GPU multiplies meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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


BEHIND_CHOICE = 0.4
"""Of what the host takes for a layer, the share that GPU and bus wait for. Qwen3-30B-A3B on an H200, 50 % and 1 GiB of
the experts cached: prompts of 8192 and 16384 tokens took 67 and 71 ms longer than is predicted for their kernels, of
103 ms predicted for the host; on another host with 1 GiB, ones of 512 and 2048 tokens 68 and 28 ms longer than their
copies, of 157 ms. With 0.4 these are predicted within a fifth."""


@dataclass(frozen=True)
class PromptLayer:
    """What a layer of a prompt's micro-batch consists of.

    missing, cached: tokens of each expert that has some, in no slot and in one. nbytes: of one expert. dense: seconds
    of attention and all else that is no routed expert; gpu_expert, gpu_token: of one expert's weights and of a token
    with it, on the GPU; launches: of the host, to start it all.
    """

    missing: Sequence[int]
    cached: Sequence[int]
    nbytes: int
    dense: float
    gpu_expert: float
    gpu_token: float
    launches: float

    def gpu_seconds(self, counts: Sequence[int]) -> float:
        """With experts of so many tokens each on the GPU."""
        return self.dense + len(counts) * self.gpu_expert + sum(counts) * self.gpu_token


def layer_terms(layer: PromptLayer, pcie: float) -> dict[str, float]:
    """Seconds by resource; the layer takes as long as the longest, because they work at the same time.

    Only behind the router's choice, which the host waits for, GPU and bus wait for the host. pcie: bytes per second.
    The CPU's share is left out: copies that run ahead leave it few experts.
    """
    gpu, waiting = layer.gpu_seconds([*layer.cached, *layer.missing]), BEHIND_CHOICE * layer.launches
    copies = len(layer.missing) * layer.nbytes / pcie
    return {
        "misses": copies + waiting if copies else 0.0,
        "gpu": gpu + waiting,
        "launches": layer.launches,
    }
