"""How a prompt is computed: in decode steps or streamed, and which experts the CPU takes. A cost model, no torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_engine.routing_estimate import RoutingEstimate

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]

NEWEST = 0.2  # weight of the newest measurement in what is learnt
UNTRIED = 0.5  # what streaming may take, by what is expected, as long as nobody has tried
TRIED_ABOVE = 256  # tokens: kernels compile for seconds the first time, and steps of shorter prompts take little
COMPARED = 2048  # tokens up to which streaming is what is learnt of; longer prompts are bound by products
SHORT_PROMPT = 256  # tokens whose inputs come along with the choice, in case the CPU computes some
TRIALS = 2  # the faster of them counts: a first one may be slow


@dataclass(frozen=True)
class PromptRates:
    """Bytes and operations per second, and seconds. The defaults are of a PCIe 5 machine with 16 cores; measured ones
    replace them.

    Copies to the GPU read the same memory as the CPU: together they get `dram` at most.
    """

    pcie: float = 50e9
    dram: float = 110e9
    cpu: float = 1.5e12  # operations of the CPU's kernels for many tokens
    gpu: float = 250e12  # of the grouped product
    hits: float = 2.5e12  # bytes of experts in VRAM that a step reads
    cpu_factor: float = 1.0  # what the CPU's work takes, by the seconds that follow from the above
    hand_over: float = 150e-6  # seconds: tokens to the CPU and its sums back
    step_layer: float = 70e-6  # seconds of a layer of a step with some prompt tokens, beside the bytes it reads
    stream_layer: float = 2.5e-3  # seconds of the host for a streamed layer, mostly launches
    cached_layer: float = 2e-3  # the same where no layer misses anything


def cpu_seconds(n_token: IntArray, nbytes: int, operations: int, rates: PromptRates) -> FloatArray:
    """For experts with so many tokens each; operations: of one token. Weights are read beside the copies to the GPU."""
    reading = nbytes / max(rates.dram - rates.pcie, rates.dram / 4)
    seconds: FloatArray = rates.cpu_factor * np.maximum(reading, n_token * (operations / rates.cpu))
    return seconds


def choose_for_cpu(
    counts: IntArray, n_elsewhere: int, nbytes: int, operations: int, rates: PromptRates, waits: bool
) -> int:
    """How many of the experts that would have to be copied, those with the fewest tokens, the CPU should compute.

    counts: tokens of each, ascending. n_elsewhere: (token, expert) pairs of other experts. operations: of one pair,
    nbytes: of one expert. waits: whether the layer waits while tokens come to the CPU. The layer takes as long as the
    slowest of bus, GPU and CPU; the least of that over all cuts, and with equal times the fewest experts on the CPU.
    """
    gpu = (n_elsewhere + int(counts.sum())) * operations / rates.gpu
    link = np.arange(len(counts), -1, -1) * (nbytes / rates.pcie)
    cpu = rates.hand_over + np.cumsum(cpu_seconds(counts, nbytes, operations, rates))
    times = np.maximum(gpu, link)
    times[1:] = np.maximum(times[1:], cpu) + waits * rates.hand_over
    return int(times.argmin())


@dataclass
class PromptWay:
    """Chooses between decode steps of some tokens each and streaming a micro-batch, and learns from what they took."""

    n_layer: int  # with experts
    n_expert: int
    top_k: int
    expert_bytes: float  # of one
    missing: float  # share of the experts that are in no slot
    tokens_per_step: int
    routing: RoutingEstimate
    step_factor: float = 1.0  # seconds, by those that follow from the rates
    stream_factor: float = 1.0
    n_in_steps: int = 0  # prompts that were measured
    n_streamed: int = 0

    def in_steps(self, n_token: int, rates: PromptRates) -> bool:
        steps = self.step_factor * self._step_seconds(n_token, rates)
        return steps < self._expected_factor(n_token) * self._stream_seconds(n_token, rates)

    def _expected_factor(self, n_token: int) -> float:
        """Of streaming. Before it was measured no more than for steps: where these take less, fewer experts are used
        than estimated. And what may be faster is tried once steps are measured: rates of the host come out too low on a
        busy one."""
        if self.n_streamed >= TRIALS:
            return self.stream_factor
        return min(1.0, self.step_factor) * (UNTRIED if self.n_in_steps and n_token > TRIED_ABOVE else 1.0)

    def note(self, n_token: int, in_steps: bool, seconds: float, rates: PromptRates) -> None:
        """What a prompt took; those in steps without what was done for the first time, streamed ones in one pass."""
        expected = (self._step_seconds if in_steps else self._stream_seconds)(n_token, rates)
        measured = min(3.0, seconds / expected)  # one that was held up says little
        if in_steps:
            self.n_in_steps += 1
            self.step_factor += max(NEWEST, 1 / self.n_in_steps) * (measured - self.step_factor)
            return
        if n_token > COMPARED:
            return
        self.n_streamed += 1
        if self.n_streamed <= TRIALS:
            self.stream_factor = measured if self.n_streamed == 1 else min(self.stream_factor, measured)
        else:
            self.stream_factor += NEWEST * (measured - self.stream_factor)

    def _used_bytes(self, n_token: int) -> float:
        """Of a layer."""
        return len(self.routing.counts(n_token, self.n_expert, self.top_k)) * self.expert_bytes if n_token else 0.0

    def _step_seconds(self, n_token: int, rates: PromptRates) -> float:
        whole, rest = divmod(n_token, self.tokens_per_step)
        used = whole * self._used_bytes(self.tokens_per_step) + self._used_bytes(rest)
        reading = max(self.missing * used / rates.dram, (1 - self.missing) * used / rates.hits)
        return self.n_layer * ((whole + (rest > 0)) * rates.step_layer + reading)

    def _stream_seconds(self, n_token: int, rates: PromptRates) -> float:
        host = rates.stream_layer if self.missing else rates.cached_layer
        return self.n_layer * max(host, self.missing * self._used_bytes(n_token) / rates.dram)
