"""From samples to result rows: JSON objects with the field names of llama-bench where the meaning is the same.

Speeds are in tokens per second, `*_ns` in nanoseconds, sizes in bytes.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moe_engine.benchmark.plan import Test
from moe_engine.stats import PromptCounts, Stats

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One timed run of a test."""

    seconds: float
    n_token: int  # of all sequences
    stats: Stats | None = None  # of the engine, if it was ours
    prompt: PromptCounts | None = None  # of its prompts' experts, if it counts them


@dataclass(frozen=True)
class Limit:
    """The speed that the machine's memories, bus and arithmetic allow, and which of them sets it."""

    rate: float  # tokens per second
    term: str


def timing(test: Test, samples: Sequence[Sample]) -> Row:
    """What every row has: the test, and mean and deviation of its samples."""
    rates = [sample.n_token / sample.seconds for sample in samples]
    nanoseconds = [round(sample.seconds * 1e9) for sample in samples]
    return {
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.fmean(nanoseconds)),
        "stddev_ns": round(deviation(nanoseconds)),
        "avg_ts": round(statistics.fmean(rates), 6),
        "stddev_ts": round(deviation(rates), 6),
        "samples_ns": nanoseconds,
        "samples_ts": [round(rate, 6) for rate in rates],
    }


def deviation(values: Sequence[float]) -> float:
    """Of the sample (divided by n - 1); 0 for one value, as in llama-bench."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def decode_costs(samples: Sequence[Sample]) -> Row:
    """Where the experts of generated tokens came from and what the GPU waited for, over all samples; values are None
    where nothing was counted. Bytes are of one step, which computes a token of every sequence."""
    found = [sample.stats for sample in samples if sample.stats is not None]
    hits = sum(stats.expert_hits for stats in found)
    uses = hits + sum(stats.expert_misses for stats in found)
    steps = sum(stats.steps for stats in found)
    seconds = sum(stats.decode_seconds for stats in found)
    layers = [
        [sum(of_layer) for of_layer in zip(*counts, strict=True)]
        for counts in ([stats.layer_hits for stats in found], [stats.layer_misses for stats in found])
    ]
    sources = {"dense": "dense_bytes", "vram": "hit_bytes", "cpu": "cpu_bytes", "pcie": "pcie_bytes"}
    return {
        "hit_rate": hits / uses if uses and steps else None,
        "layer_hit_rate": [round(h / max(1, h + m), 4) for h, m in zip(*layers, strict=True)],
        "step_bytes": {
            name: round(sum(getattr(stats, field) for stats in found) / steps) for name, field in sources.items()
        }
        if steps
        else None,
        "gpu_wait_share": sum(stats.gpu_wait_seconds for stats in found) / seconds if steps and seconds else None,
    }


def prompt_costs(samples: Sequence[Sample]) -> Row:
    """The same of prompts: an expert counts once for each layer and micro-batch, bytes are of one repetition."""
    found = [sample.prompt for sample in samples if sample.prompt is not None]
    hits = sum(counts.cached for counts in found)
    uses = hits + sum(counts.streamed + counts.cpu for counts in found)
    if not uses:
        return {"hit_rate": None, "prompt_bytes": None}
    sources = {"pcie": "streamed_bytes", "cpu": "cpu_bytes"}
    nbytes = {
        name: round(sum(getattr(counts, field) for counts in found) / len(found)) for name, field in sources.items()
    }
    return {"hit_rate": hits / uses, "prompt_bytes": nbytes}


def missing_bytes(samples: Sequence[Sample]) -> float:
    """Of the experts in no slot that a prompt has used, once for each micro-batch; mean of the samples."""
    found = [sample.prompt for sample in samples if sample.prompt is not None]
    used = sum(n.cpu_bytes + n.streamed_bytes * n.streamed / max(1, n.streamed + n.unused) for n in found)
    return used / max(1, len(found))


def decode_limit(samples: Sequence[Sample]) -> Limit | None:
    """By the bytes that the steps have read: see `hardware.Bound`. None where no steps were counted."""
    steps = tokens = 0
    vram = ram = 0.0
    for sample in samples:
        stats = sample.stats
        if stats is not None and stats.bound is not None:
            steps += stats.steps
            tokens += stats.decode_tokens
            vram += stats.bound.vram_seconds * stats.steps
            ram += stats.bound.miss_seconds * stats.steps
    if not steps or max(vram, ram) <= 0:
        return None
    return Limit(tokens / max(vram, ram), "VRAM" if vram >= ram else "RAM")


def slowest(n_token: float, seconds: dict[str, float]) -> Limit | None:
    """seconds: what each term takes at least; terms overlap."""
    term = max(seconds, key=lambda name: seconds[name])
    return Limit(n_token / seconds[term], term) if seconds[term] > 0 else None


def limits(limit: Limit | None, avg_ts: float) -> Row:
    return {
        "bound_ts": round(limit.rate, 6) if limit else None,
        "bound_share": avg_ts / limit.rate if limit and math.isfinite(limit.rate) else None,
        "bound_by": limit.term if limit else None,
    }


def test_of(row: Row) -> Test:
    return Test(row["n_prompt"], row["n_gen"], row["n_depth"])


def add_ratios(rows: Sequence[Row]) -> None:
    """Notes in the rows of other engines how many times as fast ours was at the same test with the same options."""

    def place(row: Row) -> str:
        return json.dumps([test_of(row).name, row["options"]], sort_keys=True)

    ours = {place(row): row["avg_ts"] for row in rows if row["engine"] == "moe_engine"}
    for row in rows:
        if row["engine"] != "moe_engine" and place(row) in ours and row["avg_ts"]:
            row["ratio"] = ours[place(row)] / row["avg_ts"]
