"""Which policy and how many slots, by what simulated outcomes say; and hit rates as a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_engine.errors import ConfigError
from moe_engine.policies.registry import PolicySpec, policy_of
from moe_engine.simulator import Outcome, simulate
from moe_engine.traces import Trace

GIB = 1 << 30
WORTH = 0.05  # share of the missed bytes that another GiB must save to be worth it


@dataclass(frozen=True)
class Step:
    """The best policy at a size, and what another GiB of slots would save. All in bytes; missed ones are per token."""

    policy: str
    capacity: int  # experts per layer
    slot_bytes: int
    hit_rate: float
    missed: float
    missed_with_another_gib: float

    @property
    def saved(self) -> float:
        """Share of the missed bytes."""
        return 1 - self.missed_with_another_gib / self.missed if self.missed else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "saved": self.saved}


def recommend(
    trace: Trace,
    policies: Sequence[PolicySpec],
    capacities: Sequence[int],
    expert_bytes: int,
    *,
    warm: bool,
    shared: bool,
) -> tuple[list[Step], Step]:
    """For each capacity the policy with the most hits; and the smallest size at which another GiB is not worth it.

    Policies that foresee are left out. Raises ConfigError if no policy is left.
    """
    runnable = [spec for spec in policies if not spec.foresees]
    if not runnable:
        raise ConfigError("no policy to recommend: give at least one that does not know the future")
    model = trace.model

    def missed(outcome: Outcome) -> float:
        return (1 - outcome.hit_rate) * model.n_layer * model.top_k * expert_bytes

    per_slot = model.n_layer * expert_bytes  # a slot in every layer
    steps = []
    for capacity in capacities:
        outcomes = simulate(trace, runnable, [capacity], warm=warm, shared=shared)
        best = max(outcomes, key=lambda outcome: outcome.hit_rate)
        more = min(model.n_expert, capacity + max(1, GIB // per_slot))
        (grown,) = simulate(trace, [policy_of(best.policy)], [more], warm=warm, shared=shared)
        # Where a GiB is less than a slot in every layer, it saves its part of one.
        part = min(1.0, GIB / per_slot)
        saved = part * (missed(best) - missed(grown))
        steps.append(
            Step(best.policy, capacity, capacity * per_slot, best.hit_rate, missed(best), missed(best) - saved)
        )
    return steps, next((step for step in steps if step.saved < WORTH), steps[-1])


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
