"""What to change about a plan for twice a speed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moe_engine.errors import CapacityError, ConfigError
from moe_engine.planner import ALL_FIT, Plan
from moe_engine.predict import BOUND_BY, Prediction, RunShape

SHARES_TO_TRY = (0.25, 0.5, 0.75, 1.0)  # of the experts in VRAM
UBATCHES_TO_TRY = (1024, 2048, 4096, 8192)

Change = tuple[str, RunShape]  # what to set, and what comes of it


def doubling(plan: Plan) -> dict[str, str]:
    """By name of a predicted speed; empty where there are none."""
    predictor = plan.predictor
    if predictor is None or plan.decode is None:
        return {}
    changes = _changes(plan)
    decode = partial(predictor.decode, context=plan.decode_context)
    found = {"decode": _to_double(plan.decode, decode, changes)}
    for prompt in plan.prompts:
        again = partial(predictor.prompt, n_token=prompt.tokens)
        found[f"prompt of {prompt.tokens}"] = _to_double(prompt, again, changes)
    return found


def _to_double(current: Prediction, again: Callable[[RunShape], Prediction], changes: Sequence[Change]) -> str:
    """The least change with which `again` predicts twice the speed of `current`."""
    best: tuple[float, str] | None = None
    for text, shape in changes:
        rate = again(shape).rate
        if rate >= 2 * current.rate:
            return f"{text}: {rate:.0f} tok/s"
        if best is None or rate > best[0]:
            best = rate, text
    if best is None or best[0] < 1.05 * current.rate:
        return f"no setting does; it takes a faster machine where the bound is: {BOUND_BY[current.binding]}"
    return f"no single setting does; {best[1]}: {best[0]:.0f} tok/s"


def _changes(plan: Plan) -> list[Change]:
    """Settings to try, the cheaper ones first."""
    if plan.vram is None:
        return []
    found = []
    for ubatch in UBATCHES_TO_TRY:
        if plan.ubatch < ubatch <= plan.ctx and (other := _with(plan, ubatch=ubatch)):
            found.append((f"ubatch {ubatch}", other.run_shape))
    for share in SHARES_TO_TRY if plan.n_movable else ():
        if share > plan.share and (other := _with_share(plan, share)):
            assert other.vram is not None
            cache = "experts cache, " if plan.config.experts == "cpu" else ""
            text = f"{cache}vram_budget {other.vram.budget >> 20}MiB, room for {other.share:.0%} of the experts"
            found.append((text, other.run_shape))
    return found


def _with(plan: Plan, **changes: Any) -> Plan | None:
    """The plan with other settings, None if it is impossible."""
    config = replace(plan.config, **changes)
    try:
        return replace(plan, config=config, vram=plan.divide(config))
    except (CapacityError, ConfigError):
        return None


def _with_share(plan: Plan, share: float) -> Plan | None:
    """The plan with just enough VRAM for a share of the experts; more of it also changes other terms."""
    other: Plan | None = plan
    for _ in range(6):
        if other is None or other.vram is None or other.share >= share:
            return other
        missing = int((share - other.share) * ALL_FIT * plan.movable_bytes)
        budget = other.vram.budget + max(missing, 1 << 20)
        other = _with(other, vram_budget=budget >> 20 << 20, experts="cache")
    return other
