"""The command line: `moe-engine bench`, `bench compare`, `bench plot`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from moe_engine.cli_options import notes
from moe_engine.errors import ConfigError

app = typer.Typer(invoke_without_command=True)

Texts = list[str] | None
ENGINE, MODEL, PEERS, OUTPUT = "How the model is loaded (lists: all combinations)", "Which model", "Peers", "Output"


@app.callback()
def bench(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="GGUF file. Default: the bundled model.", rich_help_panel=MODEL)
    ] = None,
    n_prompt: Annotated[Texts, typer.Option("-p", "--n-prompt", help="Prompt tokens; 0: none. Default: 512.")] = None,
    n_gen: Annotated[Texts, typer.Option("-n", "--n-gen", help="Generated tokens; 0: none. Default: 128.")] = None,
    both: Annotated[Texts, typer.Option("-pg", help="PROMPT,TOKENS: one after the other, timed as one.")] = None,
    n_depth: Annotated[
        Texts, typer.Option("-d", "--n-depth", help="Tokens of context before that. Default: 0.")
    ] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Of every test.")] = 3,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="One -p and one -n at depths 0, p, 2p, ... up to -d, as sweep-bench.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N, or simulated.", rich_help_panel=ENGINE)
    ] = "auto",
    vram_budget: Annotated[
        Texts, typer.Option(help="Such as 6GiB, or a share of the experts: 10%,25%.", rich_help_panel=ENGINE)
    ] = None,
    batch: Annotated[Texts, typer.Option(help="Sequences that run together.", rich_help_panel=ENGINE)] = None,
    threads: Annotated[Texts, typer.Option("--threads", "-t", help="CPU threads.", rich_help_panel=ENGINE)] = None,
    ubatch: Annotated[
        Texts, typer.Option("--ubatch", "-ub", help="Prompt tokens at once.", rich_help_panel=ENGINE)
    ] = None,
    policy: Annotated[
        Texts,
        typer.Option("--policy", help="Who leaves the VRAM slots: NAME[:key=value,...],...", rich_help_panel=ENGINE),
    ] = None,
    settings: Annotated[
        Texts,
        typer.Option(
            "--set", help="NAME=VALUE,...: any other option of the engine, as miss=cpu,fetch.", rich_help_panel=ENGINE
        ),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            help="Random weights: qwen3-30b-a3b, qwen3-235b-a22b, deepseek-v2-lite or deepseek-v3. Written once.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Only its first layers.", rich_help_panel=MODEL)] = None,
    skew: Annotated[
        float | None,
        typer.Option(
            help="How much its routers prefer some experts; 0: not at all. Default: 0.35.", rich_help_panel=MODEL
        ),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Its types: q4_k_m, q5_k_m, q6_k, q8_0. Default: q4_k_m.", rich_help_panel=MODEL),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for random models. Default: the user's cache.", rich_help_panel=MODEL)
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(help="Trace to follow in place of the model's routing (GPU).", rich_help_panel=MODEL),
    ] = None,
    against: Annotated[
        Texts,
        typer.Option(help="llama-bench=PATH, ik=PATH or accelerate; several times.", rich_help_panel=PEERS),
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="table, md, json or csv.", rich_help_panel=OUTPUT)
    ] = "table",
    output_err: Annotated[
        str | None, typer.Option("-oe", "--output-err", help="The same on stderr, too.", rich_help_panel=OUTPUT)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures and traces.", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Measure speeds as llama-bench does, and how far they are from what the hardware allows."""
    if context.invoked_subcommand is not None:
        return
    from moe_engine.benchmark import plan, plots, tables
    from moe_engine.benchmark.session import Session
    from moe_engine.loading import bundled_model

    for form in filter(None, (output, output_err)):
        if form not in tables.FORMATS:
            raise ConfigError(f"output is {form!r}, expected one of: {', '.join(tables.FORMATS)}")
    if plot is not None:
        plots.require_matplotlib()
        plots.make_folder(plot)
    if random is not None and model is not None:
        raise ConfigError("give either --model or --random")
    shape: dict[str, Any] = {"layers": layers, "skew": skew, "mix": mix, "work": work}
    shape = {name: value for name, value in shape.items() if value is not None}
    if shape and random is None:
        raise ConfigError(f"--{', --'.join(shape)}: only with --random, which is not given")
    only_both = bool(both) and n_prompt is None and n_gen is None
    prompts = plan.numbers("-p", n_prompt or (["0"] if only_both else ["512"]))
    gens = plan.numbers("-n", n_gen or (["0"] if only_both else ["128"]))
    depths = plan.numbers("-d", n_depth or ["0"])
    pairs = plan.pairs("-pg", both or [])
    tests = plan.sweep(prompts, gens, depths) if sweep else plan.all_tests(prompts, gens, depths, pairs)
    given = {"vram_budget": vram_budget, "n_sequence": batch, "threads": threads, "ubatch": ubatch, "policy": policy}
    named = {name: texts for name, texts in given.items() if texts}
    others = _settings(settings or [])
    for name in named.keys() & others.keys():
        raise ConfigError(f"--set {name} says again what an option of its own says: give one of them")
    session = Session(
        _random(random, **shape) if random else model or bundled_model(),
        plan.loads({"device": [device], **named, **others}),
        tests,
        repetitions,
        routing,
        against or [],
        with_timeline=plot is not None,
        arguments=sys.argv[1:],
    )
    counts = [0, 0]

    def progress(done: int, total: int, last: str) -> None:
        counts[:] = done, total
        update(done, total, last)

    with _bar("measuring") as update:
        rows = session.run(progress)
    sys.stdout.write(tables.render(rows, output, sweep=sweep))
    if output_err is not None:
        sys.stderr.write(tables.render(rows, output_err, sweep=sweep))
    if plot is not None:
        for picture in plots.write_plots(rows, plot):
            notes.print(str(picture), style="dim", markup=False, soft_wrap=True)
    if counts[0] < counts[1]:
        raise KeyboardInterrupt  # during the measurements: what there was has been shown


@app.command("compare")
def compare_(
    before: Annotated[Path, typer.Argument(help="Result of `bench -o json`, or of llama-bench.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    threshold: Annotated[str, typer.Option(help="How much slower is still well, as 5% or 0.05.")] = "5%",
) -> None:
    """Show how speeds have changed; exit with 1 if one is lower beyond the threshold and beyond noise."""
    from moe_engine.benchmark.compare import compare
    from moe_engine.benchmark.tables import plain, read_rows

    limit = _share(threshold)
    found = compare(read_rows(before), read_rows(after))
    lines = []
    for row in found.differences:
        verdict = "slower" if row.slower(limit) else "faster" if row.change > max(limit, row.noise) else ""
        lines.append(
            [row.name, f"{row.before:.2f}", f"{row.after:.2f}", f"{row.change:+.1%}", f"± {row.noise:.1%}", verdict]
        )
    sys.stdout.write(plain(["test", "before t/s", "after t/s", "change", "noise", ""], lines))
    for file, names in ((before, found.only_before), (after, found.only_after)):
        for name in names:
            notes.print(f"only in {file}: {name}", style="yellow", markup=False, soft_wrap=True)
    slower = sum(row.slower(limit) for row in found.differences)
    if slower:
        notes.print(f"{slower} of {len(lines)} slower by more than {limit:.1%} and noise", style="red")
        raise typer.Exit(1)


@app.command("plot")
def plot_(
    files: Annotated[list[Path], typer.Argument(help="Results of `bench -o json`.")],
    folder: Annotated[Path, typer.Option("--to", help="Folder for pictures and traces.")],
) -> None:
    """Draw pictures of results: speed over cache size and prompt length, hit rates, a decode step."""
    from moe_engine.benchmark.plots import write_plots
    from moe_engine.benchmark.tables import read_rows

    for path in write_plots([row for file in files for row in read_rows(file)], folder):
        print(path)


def _random(name: str, work: Path | None = None, **shape: Any) -> Path:
    from moe_engine.benchmark.random_model import random_model
    from moe_engine.cache_files import cache_folder

    with _bar("writing the random model") as update:
        return random_model(name, work or cache_folder(), progress=lambda n, of: update(n, of, ""), **shape)


@contextmanager
def _bar(what: str) -> "Iterator[Callable[[int, int, str], None]]":
    """A bar on stderr that vanishes when done; nothing where stderr is not a terminal."""
    columns = (
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(what, total=None, last="")
        yield lambda done, total, last: bar.update(task, completed=done, total=total, last=last)


def _settings(texts: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"--set is {text!r}, expected NAME=VALUE,...")
        found.setdefault(name, []).append(values)
    return found


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"threshold is {text!r}, expected a share such as 5% or 0.05")
    return share
