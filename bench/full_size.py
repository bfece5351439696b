"""What benches of full-size random models share: options, files, budgets, and results that are kept row by row."""

import argparse
import gc
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

if not torch.cuda.is_available():  # must be known before the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from moe_engine import Engine
from moe_engine.benchmark.random_model import write_model
from moe_engine.inspection import inspect_file

QWEN, LITE, V3 = "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3"
LAYERS = {V3: 7}  # of models of which only the first ones are written
ROUTING = Path(__file__).parent / "data" / "routing.npz"  # recorded of a trained model


class Row(Protocol):
    @property
    def model(self) -> str: ...

    @property
    def name(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Row)


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """With the options that all have: `work`, `out`, `only`, `tiny`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/moe_engine_bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", help="rows whose name contains this")
    parser.add_argument("--tiny", action="store_true")
    return parser


def begun(command: str, options: argparse.Namespace) -> dict[str, Any]:
    """Results without rows."""
    gpu = "none" if options.tiny else torch.cuda.get_device_name()
    return {"command": command, "gpu": gpu, "torch": torch.__version__, "rows": []}


def by_model(rows: Sequence[AnyRow], options: argparse.Namespace) -> Iterator[tuple[Path, list[AnyRow]]]:
    """The chosen rows with their model's file; one that is missing is written, and removed behind them."""
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if not options.only or any(part in row.name for part in options.only)]
    for model in dict.fromkeys(row.model for row in rows):
        path = options.work / (f"tiny-{model}.gguf" if options.tiny else f"{model}.gguf")
        with written(model, path, layers=2 if options.tiny else LAYERS.get(model)):
            yield path, [row for row in rows if row.model == model]


@contextmanager
def written(model: str, path: Path, layers: int | None = None) -> Iterator[None]:
    """A random model is at `path`: one that was not there is written, and removed behind its use."""
    is_ours = not path.exists()
    if is_ours:
        write_model(model, path, layers=layers)
    try:
        yield
    finally:
        if is_ours:
            path.unlink(missing_ok=True)


def vram_budget(path: Path, share: float, **options: Any) -> int:
    """What a share of the experts needs beside everything else."""
    with_none = Engine.plan(path, **options)
    found = inspect_file(path)
    return with_none.budget - with_none.slots + int(share * found.routed_bytes) + 2 * sum(found.expert_bytes)


def keep(results: dict[str, Any], out: Path | None) -> None:
    """After each row, so that the ones before are there if the next one fails."""
    gc.collect()
    if out is not None:
        out.write_text(text_of(results))


def text_of(results: dict[str, Any]) -> str:
    """JSON with a line for each value, but lists of numbers on one."""
    return (
        re.sub(r"\[[^\[\]{}\"]+\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(results, indent=1)) + "\n"
    )
