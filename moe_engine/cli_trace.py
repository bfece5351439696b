"""The command line: `moe-engine trace simulate | import | export | info | record`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table

from moe_engine.cli_options import (
    ENGINE,
    AsJson,
    Device,
    Model,
    Threads,
    VramBudget,
    check_output,
    loaded,
    print_json,
    progress,
    read_text,
)
from moe_engine.config import DEFAULT_POLICY, format_size, parse_size
from moe_engine.errors import ConfigError

if TYPE_CHECKING:
    from moe_engine.predict import Prediction
    from moe_engine.recommend import Step
    from moe_engine.simulator import Outcome
    from moe_engine.traces import Trace

app = typer.Typer(help="Recorded routing: look at it, and try cache policies on it.", no_args_is_help=True)

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="Trace file, or .npz with an array 'ids'.")]
Experts = Annotated[
    int | None,
    typer.Option(min=1, help="Experts of a layer, for .npz files that do not say. Default: the largest id + 1."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]


@app.command()
def simulate(
    file: TraceFile,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="NAME[:key=value,...]; may be given several times. Default: lru, the engine's, belady."),
    ] = None,
    capacity: Annotated[
        str, typer.Option(help="Shares of the experts, experts per layer, or sizes (with -m), with commas between.")
    ] = "5%,10%,25%,50%",
    warm: Annotated[bool, typer.Option("--warm", help="Start with the first experts, not empty.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="One pool for all layers instead of one each.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Trace of an earlier run, for pinned-lru.")] = None,
    expert_bytes: Annotated[str | None, typer.Option(help="Size of one expert, such as 1.5MiB.")] = None,
    model_file: Annotated[
        Path | None, typer.Option("--model", "-m", help="GGUF file of the model, for sizes; only its header is read.")
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="Predict tokens/s on the machine of this file of calibrate. Needs -m.")
    ] = None,
    advise: Annotated[
        bool, typer.Option("--recommend", help="Say which policy and size to choose. Needs -m or --expert-bytes.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw hit rates by size into this PNG file.")] = None,
    experts: Experts = None,
    as_json: AsJson = False,
) -> None:
    """Show how often cache policies would have had the experts of a trace."""
    from moe_engine import recommend
    from moe_engine.calibration import Calibration
    from moe_engine.policies.registry import policy_of
    from moe_engine.simulated_speed import SimulatedModel
    from moe_engine.simulator import capacity_of
    from moe_engine.simulator import simulate as replay

    check_output(plot, file, profile, model_file, hardware)
    specs = [policy_of(text) for text in policy or ("lru", DEFAULT_POLICY, "belady")]
    trace = load_trace(file, experts)
    model = trace.model
    if hardware is not None and model_file is None:
        raise ConfigError("--hardware needs the model's sizes, and a trace does not say them: give its file with -m")
    if expert_bytes is not None and model_file is not None:
        raise ConfigError("--expert-bytes is what -m MODEL says: give one of them")
    sizes = None if expert_bytes is None else (_positive(expert_bytes),) * model.n_layer
    predict = room = None
    if model_file is not None:
        simulated = SimulatedModel(model_file, trace, None if hardware is None else Calibration.load(hardware))
        sizes, room = simulated.expert_bytes, simulated.room
        predict = None if hardware is None else simulated.decode
    if advise and sizes is None:
        raise ConfigError("--recommend must know the size of an expert: give -m MODEL or --expert-bytes")
    slot_bytes = None if sizes is None else sum(sizes)
    texts = capacity.split(",")
    capacities = sorted({capacity_of(text, model.n_expert, model.top_k, slot_bytes) for text in texts})
    outcomes = replay(
        trace,
        specs,
        capacities,
        warm=warm,
        shared=shared,
        profile=None if profile is None else load_trace(profile, model.n_expert),
        expert_bytes=sizes,
    )
    speeds = None if predict is None else [predict(outcome) for outcome in outcomes]
    if plot is not None:
        recommend.plot(outcomes, model.n_expert, plot)
    advice: dict[str, object] = {}
    if advise and sizes is not None:
        steps, chosen = recommend.recommend(
            trace, specs, capacities, sizes, warm=warm, shared=shared, predict=predict, room=room
        )
        advice = {"recommended": chosen.as_dict(), "steps": [step.as_dict() for step in steps]}
    if as_json:
        results = [outcome.as_dict() for outcome in outcomes]
        for result, found in zip(results, speeds or (), strict=speeds is not None):
            result.update(tokens_per_second=found.rate, bound_by=found.binding)
        print_json(**_facts(trace), warm=warm, shared=shared, results=results, **advice)
        return
    _print_outcomes(trace, outcomes, speeds)
    if advise:
        _print_advice(steps, chosen)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help=".npz with an array 'ids' (tokens, MoE layers, top-k).")],
    output: Output,
    experts: Experts = None,
) -> None:
    """Make a trace file from a numpy archive."""
    from moe_engine.trace_npz import import_npz

    check_output(output, file)
    trace = import_npz(file, experts)
    trace.save(output)
    print(f"{output}: {trace.n_token} tokens, {trace.model.n_expert} experts in each of {trace.model.n_layer} layers")


@app.command()
def export(file: TraceFile, output: Output) -> None:
    """Write a trace as a numpy archive (.npz)."""
    from moe_engine.trace_npz import export_npz

    check_output(output, file)
    trace = load_trace(file)
    export_npz(trace, output)
    print(f"{output}: {trace.n_token} tokens")


@app.command()
def info(file: TraceFile, as_json: AsJson = False) -> None:
    """Show what is in a trace."""
    trace = load_trace(file)
    if as_json:
        print_json(**_facts(trace))
        return
    for name, value in _facts(trace).items():
        print(f"{name:<14}{value}")


@app.command()
def record(
    file: Annotated[Path, typer.Option("--file", "-f", help="Text to run through the model.")],
    output: Output,
    model: Model = None,
    ctx: Annotated[
        int, typer.Option(help="Tokens of a sequence: the text is cut into such, from empty contexts.")
    ] = 1024,
    device: Device = ENGINE.device,
    vram_budget: VramBudget = None,
    threads: Threads = None,
) -> None:
    """Record which experts a model chooses for a text."""
    check_output(output, file, model)
    text = read_text(file)
    with (
        loaded(
            model, device=device, vram_budget=vram_budget, threads=threads, ctx=ctx, trace=str(output), profile=False
        ) as engine,
        progress("recording", MofNCompleteColumn()) as (bar, task),
    ):
        tokens = engine.encode(text)
        for start in range(0, len(tokens), ctx):
            engine.read(tokens[start : start + ctx])
            bar.update(task, completed=start + ctx, total=len(tokens))
    print(f"{output}: {len(tokens)} tokens")


def load_trace(path: Path, n_expert: int | None = None) -> "Trace":
    """A trace file, or an archive that `trace import` would take."""
    from moe_engine.trace_npz import import_npz
    from moe_engine.traces import Trace

    return import_npz(path, n_expert) if path.suffix == ".npz" else Trace.load(path)


def _positive(size: str) -> int:
    n_bytes = parse_size(size)
    if n_bytes < 1:
        raise ConfigError(f"expert-bytes is '{size}', expected a size above 0")
    return n_bytes


def _facts(trace: "Trace") -> dict[str, object]:
    model = trace.model
    return {
        "architecture": model.architecture,
        "hash": model.hash,
        "n_layer": model.n_layer,
        "n_expert": model.n_expert,
        "top_k": model.top_k,
        "tokens": trace.n_token,
        "sequences": len(trace.sequences),
        "weights": trace.weights is not None,
    }


def _print_outcomes(trace: "Trace", outcomes: "list[Outcome]", speeds: "list[Prediction] | None") -> None:
    model = trace.model
    out = Console(highlight=False)
    out.width = max(out.width, 120)  # a cut-off name is of no use in a file or a pipe
    out.print(
        f"{trace.n_token} tokens, {model.n_layer} MoE layers, {model.top_k} of {model.n_expert} experts; hit rate, and "
        "how much higher it could be knowing the future"
    )
    names = ("policy", "slots per layer", "hits", "to Belady", "worst layer", "best layer")
    table = Table(*names, box=None, pad_edge=False)
    with_bytes = any(outcome.bytes is not None for outcome in outcomes)
    table.add_column("fetched per token")
    if with_bytes:
        table.add_column("missed bytes per token")
    if speeds is not None:
        table.add_column("predicted tok/s")
    for i, outcome in enumerate(outcomes):
        layers = [hits / max(1, n) for hits, n in zip(outcome.hits, outcome.accesses, strict=True)]
        share = f"{outcome.capacity} ({outcome.capacity / model.n_expert:.0%})"
        rates = (outcome.hit_rate, outcome.to_belady, min(layers), max(layers))
        row = [outcome.policy, share, *(f"{rate:.1%}" for rate in rates)]
        row.append(f"{outcome.fetched / max(1, trace.n_token):.1f}")
        if outcome.bytes is not None:
            row.append(format_size(outcome.bytes / max(1, trace.n_token)))
        if speeds is not None:
            row.append(f"{speeds[i].rate:.0f}, bound by {speeds[i].binding}")
        table.add_row(*row)
    out.print(table)


def _print_advice(steps: "list[Step]", chosen: "Step") -> None:
    out = Console(highlight=False)
    out.width = max(out.width, 120)
    names = ["slots", "best policy", "hits", "missed per token", "another GiB saves"]
    table = Table(*names, *(["predicted tok/s", "with another GiB"] if chosen.rate else []), box=None, pad_edge=False)
    for step in steps:
        row = [format_size(step.slot_bytes), step.policy, f"{step.hit_rate:.1%}", format_size(step.missed)]
        rates = (step.rate, step.rate_with_another_gib)
        table.add_row(*row, f"{step.saved:.1%}", *(f"{rate:.0f}" for rate in rates if rate is not None))
    out.print()
    out.print(table)
    buys = f"save {chosen.saved:.1%} of the {format_size(chosen.missed)} that a token misses"
    if chosen.rate is not None:
        buys += f", for {chosen.rate_with_another_gib:.0f} tok/s instead of {chosen.rate:.0f}"
    out.print(
        f"\nrecommended: {chosen.policy} with {format_size(chosen.slot_bytes)} of slots ({chosen.capacity} experts per "
        f"layer); another GiB would {buys}"
    )
