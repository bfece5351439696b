"""Which policy and how many slots, by what simulated outcomes say; and hit rates as a picture."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_engine.config import format_size
from moe_engine.errors import ConfigError
from moe_engine.policies.registry import PolicySpec, policy_of
from moe_engine.predict import Prediction
from moe_engine.simulator import Outcome, simulate
from moe_engine.traces import Trace

GIB = 1 << 30
WORTH = 0.05  # that another GiB must bring to be worth it: more speed, or where that is not known fewer missed bytes


@dataclass(frozen=True)
class Step:
    """The best policy at a size, and what another GiB of slots would bring. Sizes in bytes; missed ones are per token.
    Rates in tokens/s, None where they cannot be predicted."""

    policy: str
    capacity: int  # experts per layer
    slot_bytes: int
    hit_rate: float
    missed: float
    missed_with_another_gib: float
    rate: float | None = None
    rate_with_another_gib: float | None = None

    @property
    def saved(self) -> float:
        """Share of the missed bytes."""
        return 1 - self.missed_with_another_gib / self.missed if self.missed else 0.0

    @property
    def gain(self) -> float:
        """What `WORTH` is about."""
        if self.rate is None or self.rate_with_another_gib is None:
            return self.saved
        return self.rate_with_another_gib / self.rate - 1

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "saved": self.saved}


def recommend(
    trace: Trace,
    policies: Sequence[PolicySpec],
    capacities: Sequence[int],
    expert_bytes: Sequence[int],
    *,
    warm: bool,
    shared: bool,
    predict: Callable[[Outcome], Prediction] | None = None,
    room: int | None = None,
) -> tuple[list[Step], Step]:
    """For each capacity, ascending, the best policy; and the smallest size at which another GiB is not worth it.

    expert_bytes: of an expert of each layer. predict: the speed of decoding; without it the best policy is the one that
    misses the fewest bytes. room: bytes that slots may take. Policies that foresee are left out. Raises ConfigError if
    no policy or no capacity is left.
    """
    runnable = [spec for spec in policies if not spec.foresees]
    if not runnable:
        raise ConfigError("no policy to recommend: give at least one that does not know the future")
    if trace.n_token == 0:
        raise ConfigError("nothing to recommend: the trace has no tokens")
    per_slot = sum(expert_bytes)  # a slot in every layer
    if room is not None and capacities[0] * per_slot > room:
        raise ConfigError(
            f"no capacity to recommend: the smallest takes {format_size(capacities[0] * per_slot)}, but the machine's "
            f"VRAM has {format_size(max(0, room))} for experts"
        )
    capacities = [capacity for capacity in capacities if room is None or capacity * per_slot <= room]
    # Where a GiB is less than a slot in every layer, it brings its part of one.
    part = min(1.0, GIB / per_slot)

    def costs(outcome: Outcome) -> tuple[float, float]:
        """Of a token: seconds, and missed bytes."""
        assert outcome.bytes is not None
        return 0.0 if predict is None else predict(outcome).seconds, outcome.bytes / outcome.n_token

    steps = []
    for capacity in capacities:
        outcomes = simulate(trace, runnable, [capacity], warm=warm, shared=shared, expert_bytes=expert_bytes)
        best = min(outcomes, key=costs)
        more = min(trace.model.n_expert, capacity + max(1, GIB // per_slot))
        (grown,) = simulate(
            trace, [policy_of(best.policy)], [more], warm=warm, shared=shared, expert_bytes=expert_bytes
        )
        now, then = costs(best), [a + part * (b - a) for a, b in zip(costs(best), costs(grown), strict=True)]
        rates = () if predict is None else (1 / now[0], 1 / then[0])
        steps.append(Step(best.policy, capacity, capacity * per_slot, best.hit_rate, now[1], then[1], *rates))
    return steps, next((step for step in steps if step.gain < WORTH), steps[-1])


def plot(outcomes: Sequence[Outcome], n_expert: int, path: Path) -> None:
    """Writes hit rates by size as a PNG. Raises ConfigError if that is impossible."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("--plot needs matplotlib: pip install 'moe-engine[plot]'") from e
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        mine = sorted((o for o in outcomes if o.policy == policy), key=lambda outcome: outcome.capacity)
        shares = [100 * outcome.capacity / n_expert for outcome in mine]
        axes.plot(shares, [outcome.hit_rate for outcome in mine], marker="o", label=policy)
    axes.set_xlabel("slots, % of the experts")
    axes.set_ylabel("hit rate")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e
