"""The command line: `moe-engine plan | calibrate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_engine.cli_options import ENGINE, AsJson, Ctx, Device, Place, Threads, check_output, notes, print_json
from moe_engine.config import EngineConfig, format_size

if TYPE_CHECKING:
    from moe_engine.calibration import Calibration


def plan(
    file: Annotated[Path, typer.Argument(help="GGUF file; only its header is read.")],
    vram_budget: Annotated[str | None, typer.Option(help="As for generate. Default: 90 % of what is free.")] = None,
    ram_budget: Annotated[str | None, typer.Option(help="As for generate. Default: what is free.")] = None,
    ctx: Ctx = None,
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = ENGINE.n_sequence,
    ubatch: Annotated[int | None, typer.Option(help="Prompt tokens that go through the layers at once.")] = None,
    hardware: Annotated[Path | None, typer.Option(help="Plan for the machine of this file of calibrate.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Recorded routing of this model, to estimate hits from.")] = None,
    place: Place = None,
    device: Device = ENGINE.device,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Show what would go where and how fast it would be, before loading anything."""
    from moe_engine import plan_report, planner
    from moe_engine.calibration import Calibration, this_machine
    from moe_engine.cli_trace import load_trace

    options = {} if ubatch is None else {"ubatch": ubatch}
    n_threads = EngineConfig.of(threads=threads).n_threads
    found = planner.plan(
        file,
        machine=this_machine(device, n_threads) if hardware is None else Calibration.load(hardware),
        elsewhere=hardware is not None,
        trace=None if trace is None else load_trace(trace),
        ram_budget=ram_budget,
        vram_budget=vram_budget,
        ctx=ctx,
        n_sequence=batch,
        place=tuple(place or ()),
        device=device,
        threads=threads,
        **options,
    )
    if as_json:
        print_json(**plan_report.as_dict(found))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in plan_report.lines(found):
        table.add_row(*row)
    out = Console(highlight=False, markup=False)
    out.width = max(out.width, 140)  # cut-off numbers are of no use in a file or a pipe
    out.print(f"{file}: context of {found.ctx} tokens, micro-batches of {found.ubatch}", soft_wrap=True)
    out.print(table)
    if found.machine is None:
        notes.print("no speeds: run moe-engine calibrate once, or give --hardware FILE", style="yellow")


def calibrate(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="A large file, to measure its disk.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: where engine and plan look for it.")
    ] = None,
    device: Device = ENGINE.device,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine once, in about a minute: engine and planner use it."""
    from dataclasses import asdict

    from moe_engine.backend import choose_device
    from moe_engine.calibrate import calibrate as measure
    from moe_engine.calibrate import n_steps
    from moe_engine.calibration import cache_path

    check_output(output, model)
    n_threads = EngineConfig.of(threads=threads, device=device).n_threads
    found_device, _ = choose_device(device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("", total=n_steps(found_device, model is not None), completed=-1)
        found = measure(found_device, n_threads, model, lambda what: bar.update(task, description=what, advance=1))
    path = output or cache_path(None if found.gpu is None else found.gpu.name, n_threads)
    found.save(path)
    if as_json:
        print_json(file=str(path), **asdict(found))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in _rows(found):
        table.add_row(*row)
    out = Console(highlight=False, markup=False)
    out.width = max(out.width, 120)
    out.print(table)
    notes.print(f"kept in {path}", style="dim", soft_wrap=True)


def _rows(found: "Calibration") -> Iterator[tuple[str, str]]:
    """What was measured, for people."""
    yield f"{found.processor}, {found.threads} threads", f"RAM {format_size(found.ram_bytes)}"
    rates = ", ".join(f"{n}: {_gb(rate)}" for n, rate in found.dram.items())
    yield "RAM read, GB/s by threads", rates
    yield "CPU experts, 1 token, GB/s", ", ".join(f"{t} {_gb(p.weights)}" for t, p in found.cpu_experts.items())
    yield (
        "CPU experts, many tokens, TFLOP/s",
        ", ".join(f"{t} {p.operations * 1e-12:.3g}" for t, p in found.cpu_experts.items()),
    )
    yield "a call besides, us", f"{found.cpu_call_seconds * 1e6:.1f}"
    if found.disk is not None:
        yield "disk, GB/s", _gb(found.disk)
    gpu = found.gpu
    if gpu is None:
        return
    yield gpu.name, f"VRAM {format_size(gpu.vram_bytes)}"
    yield "PCIe, GB/s by size", ", ".join(f"{format_size(n)}: {_gb(rate)}" for n, rate in gpu.pcie.items())
    yield "VRAM copy, GB/s", _gb(gpu.copy)
    yield "GPU experts, few tokens, GB/s", ", ".join(f"{t} {_gb(rate)}" for t, rate in gpu.decode.items())
    yield (
        "GPU experts, many tokens, TFLOP/s",
        ", ".join(f"{t} {p.operations * 1e-12:.3g} ({p.operations / gpu.matmul:.0%})" for t, p in gpu.prompt.items()),
    )
    yield "dequantize, GB/s", ", ".join(f"{t} {_gb(rate)}" for t, rate in gpu.dequantize.items())
    yield (
        "bf16 products, attention, TFLOP/s",
        f"{gpu.matmul * 1e-12:.3g}, {gpu.attention * 1e-12:.3g} ({gpu.attention / gpu.matmul:.0%})",
    )
    yield "kernel, exchange, us", f"{gpu.kernel_seconds * 1e6:.1f}, {gpu.exchange_seconds * 1e6:.1f}"
    steps = ", ".join(f"{n}: {seconds * 1e6:.0f}" for n, seconds in gpu.step_seconds.items())
    yield "layer of prompts' steps, us by tokens", steps
    yield (
        "host, us by layer of prompts",
        f"{gpu.layer_seconds * 1e6:.0f}, for each chunk of streamed experts {gpu.chunk_seconds * 1e6:.0f} more",
    )


def _gb(rate: float) -> str:
    return f"{rate * 1e-9:.3g}"
