"""What a generation cost."""

import resource
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

from moe_engine.config import format_size
from moe_engine.hardware import Bound

if TYPE_CHECKING:
    from moe_engine.kernels._cpu import WorkerStats


@dataclass
class PromptCounts:
    """Routed experts of prompts that go through the layers in micro-batches; each counts once for every layer and
    micro-batch in which tokens chose it.
    """

    cached: int = 0
    streamed: int = 0
    cpu: int = 0
    unused: int = 0  # copied ahead for nothing
    streamed_bytes: int = 0  # with the unused ones
    cpu_bytes: int = 0

    def since(self, before: "PromptCounts") -> "PromptCounts":
        """What has come on top."""
        return PromptCounts(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


@dataclass
class Stats:
    """Counts, seconds and bytes of one generation, or of a batch. Rates are tokens per second, None where nothing was
    timed. What concerns experts is about decode steps; a choice is one (token, expert) pair of a layer.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt's, whose keys and values were in the cache already
    prefilled_tokens: int = 0  # of the prompt's, computed in prompt_seconds: the last one decodes
    prompt_seconds: float = 0.0
    prompt_experts: PromptCounts | None = None  # of prompts that did not go through the decoder's steps, on a GPU
    decode_tokens: int = 0  # generated, of all sequences
    decode_seconds: float = 0.0
    expert_hits: int = 0  # choices found in VRAM
    expert_misses: int = 0
    layer_hits: list[int] = field(default_factory=list)  # by MoE layer
    layer_misses: list[int] = field(default_factory=list)
    steps: int = 0  # each computes a token of every sequence
    dense_bytes: int = 0  # read by the GPU in all steps: weights that are no routed experts, keys and values
    hit_bytes: int = 0  # of experts, read by the GPU from slots
    miss_bytes: int = 0  # of experts that were in no slot, each counted once per layer and step
    cpu_bytes: int = 0  # of experts, read by the CPU
    pcie_bytes: int = 0  # of experts, copied to slots
    fetched_now: int = 0  # experts copied for the step that waits for them
    fetched_ahead: int = 0  # experts the CPU has computed, copied for later steps
    fetches_used: int = 0  # copies that have been hit since
    fetches_wasted: int = 0  # copies evicted unused
    gpu_wait_seconds: float = 0.0  # the GPU has waited for the CPU's share or for copies
    cpu_seconds: float = 0.0  # the CPU has computed experts
    # Experts by MoE layer, where there was a prediction: expected to be missed, missed, and both
    layer_expected: list[int] = field(default_factory=list)
    layer_missed: list[int] = field(default_factory=list)
    layer_foreseen: list[int] = field(default_factory=list)
    pulled_bytes: int = 0  # of expected experts, into the CPU's caches
    # Experts prefetched into slots by MoE layer; those chosen when it came, in time and too late
    layer_prefetched: list[int] = field(default_factory=list)
    layer_in_time: list[int] = field(default_factory=list)
    layer_late: list[int] = field(default_factory=list)
    prefetch_wasted_bytes: int = 0  # of those not chosen then
    rate_without_prefetch: float | None = None  # tokens per second of steps that followed another at once
    rate_with_prefetch: float | None = None
    bound: Bound | None = None
    peak_vram_bytes: int = 0  # what PyTorch held at most; the CUDA context comes on top
    peak_ram_bytes: int = 0  # the process's largest resident size, mapped file pages included

    def take(self, worker: "WorkerStats", expert_bytes: Sequence[int], waited_seconds: float) -> None:
        """What the decode worker has counted. expert_bytes: by MoE layer."""
        self.layer_hits, self.layer_misses = worker.hits, worker.misses
        self.expert_hits, self.expert_misses = sum(worker.hits), sum(worker.misses)
        self.cpu_bytes, self.pcie_bytes = worker.cpu_bytes, worker.copied_bytes
        self.fetched_now, self.fetched_ahead = worker.fetched_now, worker.fetched_background
        self.fetches_used, self.fetches_wasted = worker.fetched_used, worker.fetched_unused
        self.layer_expected, self.layer_missed = worker.expected, worker.missed_experts
        self.layer_foreseen, self.pulled_bytes = worker.foreseen, worker.pulled_bytes
        self.layer_prefetched, self.layer_in_time = worker.prefetched, worker.prefetched_in_time
        self.layer_late = worker.prefetched_late
        counts = zip(self.layer_prefetched, self.layer_in_time, self.layer_late, expert_bytes, strict=True)
        self.prefetch_wasted_bytes = sum((n - in_time - late) * nbytes for n, in_time, late, nbytes in counts)
        per_step = self.decode_tokens / worker.steps if worker.steps else 0.0
        rates = (per_step * n / ns * 1e9 if ns else None for n, ns in worker.timed)
        self.rate_without_prefetch, self.rate_with_prefetch = rates
        self.cpu_seconds, self.gpu_wait_seconds = worker.cpu_ns * 1e-9, waited_seconds
        self.hit_bytes = sum(hits * nbytes for hits, nbytes in zip(worker.hits, expert_bytes, strict=True))
        if worker.steps:
            # Bytes of what was fetched for the step itself, by the mean size of an expert
            now = worker.fetched_now * sum(expert_bytes) / len(expert_bytes)
            self.miss_bytes = worker.cpu_bytes + int(now)
        self.steps = worker.steps

    @property
    def prompt_rate(self) -> float | None:
        return self.prefilled_tokens / self.prompt_seconds if self.prompt_seconds and self.prefilled_tokens else None

    @property
    def decode_rate(self) -> float | None:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def hit_rate(self) -> float | None:
        uses = self.expert_hits + self.expert_misses
        return self.expert_hits / uses if uses else None

    @property
    def lookahead_recall(self) -> float | None:
        """The share of missed experts that was expected."""
        missed = sum(self.layer_missed)
        return sum(self.layer_foreseen) / missed if missed else None

    @property
    def lookahead_precision(self) -> float | None:
        """The share of expected experts that was missed."""
        expected = sum(self.layer_expected)
        return sum(self.layer_foreseen) / expected if expected else None

    def as_dict(self) -> dict[str, Any]:
        rates = {"prompt_rate": self.prompt_rate, "decode_rate": self.decode_rate, "hit_rate": self.hit_rate}
        rates |= {"lookahead_recall": self.lookahead_recall, "lookahead_precision": self.lookahead_precision}
        bound = {"bound": {**asdict(self.bound), "share": self.bound.share}} if self.bound else {}
        return {**asdict(self), **rates, **bound}

    def summary(self) -> str:
        """One line for people."""
        parts = []
        if self.prompt_rate:
            parts.append(f"prompt {self.prompt_tokens} tokens at {self.prompt_rate:.1f} tok/s")
        if self.decode_rate:
            parts.append(f"decode {self.decode_tokens} tokens at {self.decode_rate:.1f} tok/s")
        if self.hit_rate is not None and (self.peak_vram_bytes or self.expert_hits):  # else there is none
            parts.append(f"experts from VRAM {self.hit_rate:.1%}")
        if self.bound is not None:
            parts.append(f"{self.bound.share:.0%} of what the hardware allows")
        if self.peak_vram_bytes:
            parts.append(f"peak VRAM {format_size(self.peak_vram_bytes)}")
        parts.append(f"peak RAM {format_size(self.peak_ram_bytes)}")
        return ", ".join(parts)


def peak_ram_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
