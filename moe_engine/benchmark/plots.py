"""Pictures of result rows: what is in them (plain data), and how they are drawn (matplotlib, the extra `plot`)."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_engine.benchmark.results import Row, test_of
from moe_engine.benchmark.timeline import LANES, Event, chrome_trace, unpacked
from moe_engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "attention, router": "#4c72b0",
    "hits, shared expert": "#55a868",
    "waits": "#c44e52",
    "logits, sampling": "#8172b3",
    "computes misses": "#dd8452",
}


@dataclass
class Curve:
    """Points in the order of x. bound: the speed that the hardware allows there, None where it is not known."""

    name: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    bound: list[float | None] = field(default_factory=list)


def cache_curves(rows: Sequence[Row]) -> list[Curve]:
    """Decode speed over the share of experts in VRAM; where there are no slots at all for any row, none."""
    rows = [row for row in rows if row["n_gen"] and not row["n_prompt"] and row.get("cached_share") is not None]
    return _curves(rows, lambda row: row["cached_share"], ("vram_budget", "experts"), lambda row: test_of(row).name)


def prompt_curves(rows: Sequence[Row]) -> list[Curve]:
    """Prompt speed over length, of each load and depth."""
    rows = [row for row in rows if row["n_prompt"] and not row["n_gen"]]
    return _curves(rows, lambda row: row["n_prompt"], (), lambda row: f"d{row['n_depth']}" if row["n_depth"] else "")


def _curves(
    rows: Sequence[Row], x: Callable[[Row], float], without: tuple[str, ...], test: Callable[[Row], str]
) -> list[Curve]:
    curves: dict[str, list[Row]] = {}
    for row in rows:
        curves.setdefault(_label(row, without, test(row)), []).append(row)
    found = []
    for name, points in curves.items():
        points.sort(key=x)
        found.append(
            Curve(
                name,
                [x(row) for row in points],
                [row["avg_ts"] for row in points],
                [row["stddev_ts"] for row in points],
                [row.get("bound_ts") for row in points],
            )
        )
    return [curve for curve in found if len(set(curve.x)) > 1]


def hit_map(rows: Sequence[Row]) -> tuple[list[str], list[list[float]]]:
    """Names of loads, and their hit rates by MoE layer. Of several models, the one with the most layers."""
    rows = [row for row in rows if row["n_gen"] and row.get("layer_hit_rate")]
    n_layer = max((len(row["layer_hit_rate"]) for row in rows), default=0)
    rows = [row for row in rows if len(row["layer_hit_rate"]) == n_layer]
    return [_label(row, (), test_of(row).name) for row in rows], [row["layer_hit_rate"] for row in rows]


def timelines(rows: Sequence[Row]) -> dict[str, list[Event]]:
    """Events of a decode step by load."""
    found = {_label(row, (), ""): unpacked(row["timeline"]) for row in rows if row.get("timeline")}
    return {name: events for name, events in found.items() if events}


def _label(row: Row, without: tuple[str, ...], test: str) -> str:
    options = [f"{n} {row['options'].get(n)}" for n in row.get("varied", []) if n not in without]
    return ", ".join(part for part in (row.get("model_type", ""), row.get("engine", ""), *options, test) if part)


def require_matplotlib() -> None:
    """Raises `ConfigError`; call before anything that takes long."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ConfigError('--plot needs matplotlib: pip install "moe-engine[plot]"') from e


def make_folder(folder: Path) -> None:
    """For pictures. Raises `ConfigError`; call before anything that takes long."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{folder}: pictures cannot be written: {e.strerror}") from e


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Pictures (SVG) and traces of what the rows have; what they have not is left out. Raises `ConfigError`."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written: list[Path] = []

    def picture(name: str, width: float, height: float, draw: Callable[["Axes"], None]) -> None:
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        path = folder / f"{name}.svg"
        unfinished = path.with_suffix(".part")
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # the same file every time, with small text
            figure.savefig(unfinished, format="svg", metadata={"Date": None})
        os.replace(unfinished, path)
        written.append(path)

    make_folder(folder)
    try:
        if curves := cache_curves(rows):
            picture("decode-over-cache", 7, 4.2, lambda axes: _draw_curves(axes, curves, "share of experts in VRAM"))
        if prompts := prompt_curves(rows):
            picture("prompt-over-length", 7, 4.2, lambda axes: _draw_curves(axes, prompts, "prompt tokens"))
        names, rates = hit_map(rows)
        if names:
            picture("hit-rate-by-layer", 9, 1.5 + 0.35 * len(names), lambda axes: _draw_hits(axes, names, rates))
        for number, (name, events) in enumerate(timelines(rows).items()):
            picture(f"step-{number}", 12, 2.6, lambda axes, n=name, e=events: _draw_step(axes, n, e))  # type: ignore[misc]
            trace = folder / f"step-{number}.trace.json"
            unfinished = trace.with_suffix(".part")
            unfinished.write_text(json.dumps(chrome_trace(events)) + "\n", encoding="utf-8")
            os.replace(unfinished, trace)
            written.append(trace)
    except OSError as e:
        raise ConfigError(f"{folder}: pictures cannot be written: {e.strerror}") from e
    if not written:
        raise ConfigError("there is nothing to draw: give several -p, several --vram-budget, or a GPU's hit rates")
    return written


def _draw_curves(axes: "Axes", curves: Sequence[Curve], over: str) -> None:
    for curve in curves:
        (line,) = axes.plot(curve.x, curve.y, marker="o", label=curve.name)
        axes.errorbar(curve.x, curve.y, curve.deviation, fmt="none", capsize=2, ecolor=line.get_color())
        known = [(x, bound) for x, bound in zip(curve.x, curve.bound, strict=True) if bound is not None]
        if known:
            x, bound = zip(*known, strict=True)
            axes.plot(x, bound, linestyle="--", linewidth=1, color=line.get_color(), label="the hardware's bound")
    axes.set(xlabel=over, ylabel="tokens/s", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)


def _draw_hits(axes: "Axes", names: Sequence[str], rates: Sequence[Sequence[float]]) -> None:
    image = axes.imshow(rates, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(xlabel="MoE layer", yticks=range(len(names)), yticklabels=names)
    axes.tick_params(labelsize=7)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="hit rate")


def _draw_step(axes: "Axes", name: str, events: Sequence[Event]) -> None:
    labelled: set[str] = set()
    for event in events:
        kind = "copies" if event.lane == "PCIe" else event.name
        options: dict[str, Any] = {} if kind in labelled else {"label": kind}
        labelled.add(kind)
        place = len(LANES) - 1 - LANES.index(event.lane)
        width = (event.end - event.start) / 1e6
        axes.barh(place, width, left=event.start / 1e6, height=0.7, color=_COLOURS.get(kind, "#937860"), **options)
    axes.set(xlabel="ms", yticks=range(len(LANES)), yticklabels=reversed(LANES))
    axes.set_title(name, fontsize=7)
    axes.legend(fontsize=6, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.25))
