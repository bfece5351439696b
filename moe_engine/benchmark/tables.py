"""Result rows as a table for people, Markdown, CSV or JSON, and back from JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_engine.benchmark.results import Row, test_of
from moe_engine.config import format_size
from moe_engine.errors import ConfigError

FORMATS = ("table", "md", "json", "csv")
_NEEDED = {"n_prompt": int, "n_gen": int, "avg_ts": float, "stddev_ts": float, "samples_ts": list}


def render(rows: Sequence[Row], form: str, *, sweep: bool = False) -> str:
    """Text that ends with a newline. sweep: prompt and decode speed of a depth side by side (not for json and csv)."""
    if form == "json":
        return to_json(rows)
    if form == "csv":
        return _to_csv(rows)
    header, lines = _sweep_cells(rows) if sweep else _cells(rows)
    notes = "".join(f"\n{note}\n" for note in _notes(rows))
    return (_markdown(header, lines) if form == "md" else plain(header, lines)) + notes


def to_json(rows: Sequence[Row]) -> str:
    """A list of objects, one line a field."""
    objects = (",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in row.items()) for row in rows)
    return "[\n" + ",\n".join(f" {{\n{fields}\n }}" for fields in objects) + "\n]\n"


def read_rows(path: Path) -> list[Row]:
    """Rows of `moe-engine bench -o json`, or of llama-bench. Raises `ConfigError` naming file, row and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {e.start})") from e
    return parse_rows(text, str(path))


def parse_rows(text: str, source: str) -> list[Row]:
    """As `read_rows`, of a text; `source` names it in errors."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{source}: is no JSON ({e})") from e
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{source}: expected a list of objects, as `bench -o json` writes it")
    for number, row in enumerate(rows):
        row.setdefault("n_depth", 0)  # which not every llama-bench knows
        for field, kind in {**_NEEDED, "n_depth": int}.items():
            value = row.get(field)
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise ConfigError(f"{source}: row {number}: '{field}' is {value!r:.60}, expected {kind.__name__}")
        samples = row["samples_ts"]
        numbers = [row["avg_ts"], row["stddev_ts"], *samples]
        if not samples or not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
            raise ConfigError(f"{source}: row {number}: speeds are not all finite numbers from 0 up, or there are none")
    return rows


def speed(row: Row) -> str:
    return f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    varied = list(dict.fromkeys(name for row in rows for name in row.get("varied", [])))
    columns: dict[str, list[str]] = {
        "model": [row.get("model_type", "") for row in rows],
        "size": [format_size(row.get("model_size", 0)) for row in rows],
        "backend": [row.get("backends", "") for row in rows],
        "engine": [row.get("engine", "") for row in rows],
        "threads": [str(row.get("n_threads", "")) for row in rows],
        **{name: [str(row.get("options", {}).get(name, "")) for row in rows] for name in varied},
        "test": [test_of(row).name for row in rows],
        "t/s": [speed(row) for row in rows],
        "of bound": [_bound(row) for row in rows],
        "hits": [_percent(row.get("hit_rate")) for row in rows],
        "GPU waits": [_percent(row.get("gpu_wait_share")) for row in rows],
        "read per step or prompt": [_bytes(row.get("step_bytes") or row.get("prompt_bytes")) for row in rows],
        "peak VRAM": [format_size(row["peak_vram"]) if row.get("peak_vram") else "" for row in rows],
        "peak RAM": [format_size(row["peak_ram"]) if row.get("peak_ram") else "" for row in rows],
        "ours/theirs": [f"{row['ratio']:.2f}" if row.get("ratio") else "" for row in rows],
    }
    if len(set(columns["engine"])) == 1:
        del columns["engine"]
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _sweep_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """As llama.cpp's sweep-bench: a line per depth of each engine and load."""
    lines: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        options = row.get("options", {})
        load = ", ".join(f"{name} {options.get(name)}" for name in row.get("varied", []))
        place = (row.get("engine", ""), load, row["n_depth"])
        lines.setdefault(place, {})["pp" if row["n_prompt"] else "tg"] = row
    header = ["engine", "PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s", "of bound"]
    cells = []
    for (engine, load, depth), found in lines.items():
        prompt, decode = found.get("pp"), found.get("tg")
        cells.append(
            [
                f"{engine} {load}".strip(),
                *(str(row[field]) if row else "" for row, field in ((prompt, "n_prompt"), (decode, "n_gen"))),
                str(depth),
                *(text for row in (prompt, decode) for text in _time_and_speed(row)),
                _bound(decode or {}),
            ]
        )
    return header, cells


def _time_and_speed(row: Row | None) -> tuple[str, str]:
    return (f"{row['avg_ns'] * 1e-9:.3f}", f"{row['avg_ts']:.2f}") if row else ("", "")


def _notes(rows: Sequence[Row]) -> list[str]:
    """What was not as it would be with a published model, and where it ran."""
    notes = []
    if any("random" in row.get("model_type", "") for row in rows):
        notes.append("Random weights in real shapes and types: experts are not chosen as by a trained model.")
    recorded = {row["routing"] for row in rows if row.get("routing", "own") != "own"}
    notes += [f"Routing of generated tokens: {name}, in place of the model's own." for name in sorted(recorded)]
    environment = next((row["environment"] for row in rows if row.get("environment")), None)
    if environment:
        notes.append(describe(environment))
    return notes


def describe(environment: dict[str, Any]) -> str:
    """One line of an environment."""
    versions = environment["versions"]
    parts = [
        environment["gpu"] and f"{environment['gpu']}, driver {environment['driver']}",
        f"{environment['cpu']}, {environment['cores']} cores, RAM {format_size(environment['ram'])}",
        environment["pcie_rate"] and f"PCIe {environment['pcie_rate'] / 1e9:.1f} GB/s",
        f"RAM read {environment['dram_rate'] / 1e9:.1f} GB/s",
        f"moe_engine {versions['moe_engine']} {environment['commit']}".strip(),
        f"torch {versions['torch']}",
    ]
    return "; ".join(part for part in parts if part)


def _bound(row: Row) -> str:
    share = row.get("bound_share")
    return f"{share:.0%} ({row['bound_by']})" if share is not None else ""


def _percent(value: float | None) -> str:
    return f"{value:.1%}" if value is not None else ""


def _bytes(sources: dict[str, int] | None) -> str:
    """Of experts, by who read them."""
    if not sources:
        return ""
    return ", ".join(f"{name} {format_size(n)}" for name, n in sources.items() if n)


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def plain(header: list[str], lines: list[list[str]]) -> str:
    """For a terminal."""
    table = Table(*header, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    out = io.StringIO()
    Console(file=out, width=1000, highlight=False, markup=False).print(table)
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def _to_csv(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = (row.get(name) for name in names)
        writer.writerow([json.dumps(v) if isinstance(v, dict | list) else v for v in values])
    return out.getvalue()
