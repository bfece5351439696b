"""Whether one result file is slower than another, beyond its noise."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moe_engine.benchmark.results import Row, test_of
from moe_engine.errors import ConfigError

# Two-sided 95 % quantiles of Student's t by degrees of freedom, 1 to 10; then the normal distribution's, nearly.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T95_MANY = 2.1
_PEER_OPTIONS = ("n_threads", "n_ubatch", "type_k", "type_v", "n_gpu_layers", "n_cpu_moe", "tensor_buft_overrides")


@dataclass(frozen=True)
class Difference:
    """Of one test. change: of the mean speed, relative to before; noise: what chance alone may change, likewise."""

    name: str
    before: float
    after: float
    noise: float

    @property
    def change(self) -> float:
        return self.after / self.before - 1

    def slower(self, threshold: float) -> bool:
        """By more than the threshold, and by more than noise."""
        return self.change < -threshold and -self.change > self.noise


@dataclass(frozen=True)
class Comparison:
    differences: list[Difference]
    only_before: list[str]
    only_after: list[str]


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Rows go together if test, model, engine and options are the same. Raises `ConfigError` if no two do."""
    old, new = ({_name(row): row for row in rows} for rows in (before, after))
    common = [name for name in old if name in new]
    if not common:
        raise ConfigError(
            "the files have no test in common: model, engine, options, -p, -n and -d of a row must be the same in both"
        )
    return Comparison(
        [difference(name, old[name]["samples_ts"], new[name]["samples_ts"]) for name in common],
        [name for name in old if name not in new],
        [name for name in new if name not in old],
    )


def difference(name: str, before: Sequence[float], after: Sequence[float]) -> Difference:
    """By Welch's test; a side with one sample is taken to scatter as the other one does. Of one sample each, the noise
    is not known, and given as 0."""
    means = statistics.fmean(before), statistics.fmean(after)
    if means[0] <= 0:
        raise ConfigError(f"{name}: the speed before is 0, which nothing can be compared with")
    sides = [(statistics.variance(side), len(side)) for side in (before, after) if len(side) > 1]
    if len(sides) == 2:
        parts = [(variance / n, n) for variance, n in sides]
        total = sum(part for part, _ in parts)
        freedom = sum(part**2 / (n - 1) for part, n in parts)
        degrees = total**2 / freedom if freedom else math.inf
    else:
        variance, n = sides[0] if sides else (0.0, 2)
        total, degrees = variance * (1 / len(before) + 1 / len(after)), n - 1
    quantile = _T95[int(degrees) - 1] if degrees < len(_T95) + 1 else _T95_MANY
    return Difference(name, *means, quantile * math.sqrt(total) / means[0])


def _name(row: Row) -> str:
    options = row.get("options", {name: row.get(name) for name in _PEER_OPTIONS if name in row})
    parts = [
        row.get("engine", "llama-bench"),
        row.get("model_type", ""),
        test_of(row).name,
        f"batch {row['n_sequence']}" if row.get("n_sequence", 1) != 1 else "",
        json.dumps(options, sort_keys=True).replace('"', "")[1:-1],
        f"routing {row['routing']}" if row.get("routing", "own") != "own" else "",
        json.dumps(row["knob"]) if row.get("knob") else "",
        # Files of the same name and size may differ
        row.get("model_fingerprint", ""),
    ]
    return ", ".join(part for part in parts if part)
