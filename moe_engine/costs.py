"""How long decode steps and layers of prompts take, from bytes, operations and rates: plain arithmetic.

A decode step: the GPU reads dense weights, keys and values, and the experts in slots, while the CPU reads those that
are in none. A layer of a prompt: experts that are in no slot come over the bus, and the GPU multiplies meanwhile.
"""

from collections.abc import Mapping, Sequence
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


OVERLAP = 2.5
"""Bus, GPU and host do not quite work at the same time: copies wait for room in the ring, products for copies, and all
for the choice. So a layer takes the root of the sum of their powers, a third more than one of two that are equal.

Settled with 47 prompts of 8 to 16384 tokens of Qwen3-30B-A3B, DeepSeek-V2-Lite and four layers of DeepSeek-V3, streamed
on five H200 hosts: 42 took what is predicted within a fifth, the others 0.8 to 1.24 of it."""


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

    @property
    def products(self) -> float:
        """Seconds of the GPU for the experts."""
        counts = [*self.cached, *self.missing]
        return len(counts) * self.gpu_expert + sum(counts) * self.gpu_token

    def terms(self, pcie: float, disk: float = 0.0) -> dict[str, float]:
        """Seconds by resource. pcie: bytes per second; disk: seconds of a byte of an expert that is missing."""
        nbytes = len(self.missing) * self.nbytes
        return {
            "misses": nbytes / pcie,
            "gpu": self.dense + self.products,
            "launches": self.launches,
            "disk": nbytes * disk,
        }

    def seconds(self, terms: Mapping[str, float], *, ahead: bool) -> float:
        """With `terms` as above. ahead: copies for the layer began before its choice, as of all but the first one."""
        if ahead:
            return _overlapped(terms)
        return self.dense + _overlapped({**terms, "gpu": terms["gpu"] - self.dense})


def _overlapped(terms: Mapping[str, float]) -> float:
    return float(sum(seconds**OVERLAP for seconds in terms.values()) ** (1 / OVERLAP))
