"""How a plan is shown: as rows for people, or as values for JSON."""

from typing import Any

from moe_engine.config import format_size
from moe_engine.plan_advice import doubling
from moe_engine.planner import Plan
from moe_engine.predict import BOUND_BY, Prediction


def as_dict(plan: Plan) -> dict[str, Any]:
    """All of it, sizes in bytes, for JSON."""
    vram = None
    if plan.vram is not None:
        left = plan.vram.slots - plan.slot_bytes
        vram = {"budget": plan.vram.budget, **plan.vram.terms, "expert slots": plan.slot_bytes, "left": left}
    return {
        "file": plan.path,
        "ctx": plan.ctx,
        "n_sequence": plan.config.n_sequence,
        "ubatch": plan.ubatch,
        "vram": vram,
        "ram": {
            "experts": plan.in_ram,
            "pinned": plan.vram is not None and plan.vram.caches_experts,
            "window": plan.ram.window,
        },
        "disk": {"experts": plan.on_disk},
        "experts": {"movable": plan.n_movable, "in_slots": plan.n_slot},
        "hit_rate": {"estimate": plan.hit_rate, "from": _hit_rate_source(plan)},
        "decode": None if plan.decode is None else plan.decode.as_dict(),
        "prompts": [prediction.as_dict() for prediction in plan.prompts],
        "to_double": doubling(plan),
    }


def lines(plan: Plan) -> list[tuple[str, str, str]]:
    """For people: part, what, value."""
    found = list[tuple[str, str, str]]()
    if plan.vram is not None:
        found.append(("VRAM", "budget", format_size(plan.vram.budget)))
        found += [("", name, format_size(nbytes)) for name, nbytes in plan.vram.terms.items()]
        of = f"{plan.n_slot} of {plan.n_movable} experts"
        found.append(("", "expert slots", f"{format_size(plan.slot_bytes)}, {of}"))
        found.append(("", "left", format_size(plan.vram.slots - plan.slot_bytes)))
    pinned = "experts, page-locked" if plan.vram is not None and plan.vram.caches_experts else "experts"
    found.append(("RAM", pinned, format_size(plan.in_ram)))
    if plan.ram.window:
        found.append(("", "window of experts on disk", format_size(plan.ram.window)))
    if plan.on_disk:
        found.append(("disk", "experts", format_size(plan.on_disk)))
        if plan.machine is not None and plan.machine.disk is None:
            found.append(("", "not in the speeds", "its rate is not known: moe-engine calibrate -m FILE"))
    if plan.n_slot:
        found.append(("hits", "of decoding, estimate", f"{plan.hit_rate:.0%} (from {_hit_rate_source(plan)})"))
    rows = [(f"prompt of {prompt.tokens}", prompt) for prompt in plan.prompts]
    if plan.decode is not None:
        name = "decode" if plan.config.n_sequence == 1 else f"decode, {plan.config.n_sequence} sequences"
        rows.append((name, plan.decode))
    for i, (name, speed) in enumerate(rows):
        text = f"{speed.rate:.0f} tok/s, bound by {BOUND_BY[speed.binding]} ({_terms(speed)})"
        found.append(("" if i else "speed, estimate", name, text))
    for i, (name, text) in enumerate(doubling(plan).items()):
        found.append(("" if i else "to double it", name, text))
    return found


def _hit_rate_source(plan: Plan) -> str:
    return "a recorded trace of another, small model" if plan.trace is None else "the given trace"


def _terms(speed: Prediction) -> str:
    """What the time goes to, the largest first."""
    terms = sorted(speed.terms.items(), key=lambda term: -term[1])
    return ", ".join(
        f"{name} {seconds / speed.seconds:.0%}" for name, seconds in terms if seconds > 0.01 * speed.seconds
    )
