"""The command line: `moe-engine generate | plan | calibrate | inspect | perplexity | tokenize | trace | bench`."""

import errno
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn
from rich.table import Table

from moe_engine import __version__, cli_bench, cli_plan, cli_trace
from moe_engine.cli_options import (
    ENGINE,
    SAMPLING,
    AsJson,
    Ctx,
    Device,
    KVType,
    Model,
    Place,
    RamBudget,
    Threads,
    VramBudget,
    check_output,
    loaded,
    notes,
    print_json,
    progress,
    read_text,
)
from moe_engine.config import format_size
from moe_engine.errors import ConfigError, MoeEngineError

if TYPE_CHECKING:
    from moe_engine.inspection import Inspection

app = typer.Typer(
    help="Runs mixture-of-experts models that are larger than the GPU's memory, straight from GGUF files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"moe-engine {__version__}")
        raise typer.Exit


@app.callback()
def _any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.add_typer(cli_trace.app, name="trace")
app.add_typer(cli_bench.app, name="bench")
app.command()(cli_plan.plan)
app.command()(cli_plan.calibrate)

Miss = Annotated[str, typer.Option(help="Experts not in VRAM: cpu computes them, fetch copies them, auto divides.")]
PolicyName = Annotated[
    str, typer.Option("--policy", help="Who leaves the VRAM slots: NAME[:key=value,...], as in trace simulate.")
]
TraceOutput = Annotated[Path | None, typer.Option("--trace", help="Record the routing to this file.")]
Profile = Annotated[
    bool, typer.Option("--profile/--no-profile", help="Begin with the experts that earlier runs used most.")
]
Exact = Annotated[bool, typer.Option("--exact", help="Output does not depend on the cache: fetch every miss.")]
Lookahead = Annotated[bool, typer.Option(help="Pull experts that the CPU will probably need into its caches.")]
Prefetch = Annotated[str, typer.Option(help="Copy experts into VRAM before they are needed: off, auto or always.")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    model: Model = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a file, without its last newline; - for stdin.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = SAMPLING.max_tokens,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.")] = SAMPLING.temperature,
    top_k: Annotated[int, typer.Option(help="Choose among the k most probable tokens; 0: all.")] = SAMPLING.top_k,
    top_p: Annotated[
        float, typer.Option(help="Choose among the tokens that make up this probability.")
    ] = SAMPLING.top_p,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the best one's probability.")
    ] = SAMPLING.min_p,
    repeat_penalty: Annotated[
        float | None, typer.Option(help="Penalty on recent tokens. Default: 1.1, or none at temperature 0.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the output repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given several times.")] = None,
    device: Device = ENGINE.device,
    vram_budget: VramBudget = None,
    ram_budget: RamBudget = None,
    threads: Threads = None,
    ctx: Ctx = None,
    kv_type: KVType = ENGINE.kv_dtype,
    miss: Miss = ENGINE.miss,
    policy: PolicyName = ENGINE.policy,
    exact: Exact = ENGINE.exact,
    lookahead: Lookahead = ENGINE.lookahead,
    prefetch: Prefetch = ENGINE.prefetch,
    place: Place = None,
    trace: TraceOutput = None,
    profile: Profile = ENGINE.profile,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    check_output(trace, model, prompt_file)
    text = _prompt_text(prompt, prompt_file)
    options: dict[str, Any] = {"device": device, "vram_budget": vram_budget, "ram_budget": ram_budget}
    options |= {"threads": threads, "ctx": ctx, "kv_dtype": kv_type, "miss": miss, "policy": policy, "exact": exact}
    options |= {"lookahead": lookahead, "prefetch": prefetch, "place": tuple(place or ()), "profile": profile}
    with loaded(model, **options, trace=None if trace is None else str(trace)) as engine:
        generation = engine.stream(
            [{"role": "user", "content": text}] if chat else text,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            seed=seed,
            stop=tuple(stop or ()),
        )
        if not as_json:
            for piece in generation:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
        result = generation.result()
    if as_json:
        print_json(
            prompt_tokens=result.prompt_tokens,
            tokens=result.tokens,
            text=result.text,
            finish_reason=result.finish_reason,
            stats=result.stats.as_dict(),
        )
    notes.print(result.stats.summary(), style="dim", soft_wrap=True)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="GGUF file (any part of a split one).")], as_json: AsJson = False
) -> None:
    """Show what is in a GGUF file: architecture, dimensions, bytes by role and by type."""
    from moe_engine.inspection import inspect_file

    found = inspect_file(file)
    if as_json:
        print_json(**found.as_dict())
    else:
        _print_inspection(found)


@app.command()
def perplexity(
    file: Annotated[Path, typer.Option("--file", "-f", help="Text to score.")],
    model: Model = None,
    ctx: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    device: Device = ENGINE.device,
    vram_budget: VramBudget = None,
    ram_budget: RamBudget = None,
    threads: Threads = None,
    kv_type: KVType = ENGINE.kv_dtype,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts a text (windows of CTX tokens, the second half of each is scored)."""
    from moe_engine.perplexity import perplexity as measure

    text = read_text(file)
    options = {"device": device, "vram_budget": vram_budget, "ram_budget": ram_budget, "threads": threads, "ctx": ctx}
    with (
        loaded(model, **options, kv_dtype=kv_type) as engine,
        progress("scoring", MofNCompleteColumn(), TextColumn("ppl {task.fields[ppl]:.3f}"), ppl=float("nan")) as (
            bar,
            task,
        ),
    ):
        result = measure(
            engine,
            text,
            ctx,
            progress=lambda done, total, ppl: bar.update(task, completed=done, total=total, ppl=ppl),
        )
    if as_json:
        print_json(**result.as_dict())
    else:
        print(f"perplexity {result.ppl:.4f} +/- {result.error:.4f} ({result.tokens} tokens, {result.chunks} windows)")


@app.command()
def tokenize(
    text: Annotated[str, typer.Argument(help="Text to cut into tokens.")],
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Show the tokens of a text."""
    from moe_engine.gguf_file import GGUFFile
    from moe_engine.loading import bundled_model
    from moe_engine.tokenizer import Tokenizer

    source = model or bundled_model()
    tokenizer = Tokenizer.from_metadata(GGUFFile(source).metadata, str(source))
    tokens = tokenizer.encode(text)
    if as_json:
        print_json(tokens=tokens, texts=[tokenizer.token_text(token) for token in tokens])
        return
    for token in tokens:
        print(f"{token:>8}  {tokenizer.token_text(token)!r}")


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give either a PROMPT or --prompt-file")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    return read_text(prompt_file).removesuffix("\n")  # the editor's; a newline that is meant comes before it


def _print_inspection(found: "Inspection") -> None:
    out = Console(highlight=False, markup=False, soft_wrap=True)
    supported = "" if found.supported else "  (not supported by this version: it cannot be run)"
    out.print(f"{found.path}: {found.name or 'unnamed'}, {format_size(found.file_bytes)}")
    out.print(f"architecture {found.architecture}{supported}")
    sizes = Table("role", "size", box=None, pad_edge=False)
    for role in ("dense", "shared", "routed"):
        sizes.add_row(role, format_size(getattr(found, f"{role}_bytes")))
    sizes.add_row("one expert", " or ".join(map(format_size, found.expert_bytes)) or "-")
    sizes.add_row("routed, per token", format_size(found.active_bytes))
    types = Table("type", "tensors", "size", box=None, pad_edge=False)
    for use in found.types:
        types.add_row(use.type, str(use.tensors), format_size(use.nbytes))
    keys = Table("key", "value", box=None, pad_edge=False)
    for key, value in found.dimensions.items():
        keys.add_row(key, str(value))
    for table in (sizes, types, keys):
        out.print()
        out.print(table)
    if found.unknown_types:
        out.print(f"\n{len(found.unknown_types)} tensors have types unknown to this version")


INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point: our errors become one line on stderr, Ctrl-C ends quietly. Always exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if sys.stdout is None or sys.stdin is None:
            raise ConfigError("standard input or output is closed")
        try:
            app(arguments)
        finally:
            sys.stdout.flush()
    except MoeEngineError as error:
        notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as error:  # typer makes this of Ctrl-C
        if error.code == INTERRUPTED:
            notes.print("interrupted", style="yellow")
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE):
            raise
        _leave_output()
        if error.errno == errno.EPIPE:
            sys.exit(141)
        notes.print(f"error: standard output cannot be written: {error.strerror}", style="red", markup=False)
        sys.exit(1)


def _leave_output() -> None:
    """What is still buffered would be written once more at the end."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


if __name__ == "__main__":
    main()
