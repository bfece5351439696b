"""What the commands share: options, the model under a progress bar, notes on stderr, JSON on stdout."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from moe_engine.config import EngineConfig, SamplingParams
from moe_engine.errors import ConfigError

if TYPE_CHECKING:
    from moe_engine.engine import Engine

ENGINE, SAMPLING = EngineConfig(), SamplingParams()  # the defaults
# Results go to stdout; progress, summaries and errors to stderr.
notes = Console(stderr=True, highlight=False)

Model = Annotated[
    Path | None, typer.Option("--model", "-m", help="GGUF file. Default: the small bundled model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or simulated (the CUDA path on the CPU).")]
VramBudget = Annotated[str | None, typer.Option(help="All VRAM to use, such as 6GiB. Default: 90 % of what is free.")]
RamBudget = Annotated[
    str | None,
    typer.Option(help="All RAM to use, such as 16GiB; experts beyond it are read from disk. Default: what is free."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: all.")]
Ctx = Annotated[int | None, typer.Option(help="Context in tokens. Default: 4096, or what the model has.")]
KVType = Annotated[str, typer.Option(help="Type of the KV cache: f16, bf16, f32 or q8_0.")]
Place = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX=PLACE", help="Where layers' experts are, by tensor name: cuda:0, cache, cpu or disk."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@contextmanager
def loaded(model: Path | None, **options: Any) -> "Iterator[Engine]":
    """Loads the model under a progress bar; closes it at the end."""
    from moe_engine.engine import Engine

    with progress("loading", DownloadColumn(), TransferSpeedColumn()) as (bar, task):
        engine = Engine.load(
            model, progress=lambda done, total: bar.update(task, completed=done, total=total), **options
        )
    with engine:
        yield engine


@contextmanager
def progress(what: str, *columns: ProgressColumn, **fields: Any) -> "Iterator[tuple[Progress, Any]]":
    """A bar on stderr that vanishes when done; nothing where stderr is not a terminal."""
    columns = (TextColumn(what), BarColumn(), *columns, TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        yield bar, bar.add_task(what, total=None, **fields)


def check_output(output: Path | None, *inputs: Path | None) -> None:
    """Raises `ConfigError` if what is to be written is what is to be read."""
    for path in inputs:
        if output is not None and path is not None and output.exists() and path.exists() and output.samefile(path):
            raise ConfigError(f"{output}: is read by the same command: choose another file to write")


def read_text(path: Path) -> str:
    """Of a file, or of standard input for "-". Raises `ConfigError` for what cannot be read and what is not UTF-8."""
    try:
        if str(path) == "-":
            return sys.stdin.read()
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {e.start})") from e


def print_json(**values: Any) -> None:
    """One object, on one line."""
    sys.stdout.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
