"""How fast a full-size model is loaded, cold and warm, against what disk and memory give; and a RAM budget.

    python bench/bench_load.py --work /tmp/models --out bench/results/load.json [--tiny]

Writes a random Qwen3-30B-A3B (18 GB) and a DeepSeek-V2-Lite, so the work folder decides which disk is measured. Loads
run in processes of their own. `--tiny` is a dry run with two or three layers and no GPU.
"""

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import written

from moe_engine import Engine
from moe_engine.config import format_size
from moe_engine.expert_store import ExpertStore
from moe_engine.kernels.cpu import CpuKernels

Note = Callable[[str, Callable[[], Any]], None]
"""Measures, shows and keeps what a name stands for."""

BLOCK, N_THREAD = 4 << 20, 16
N_COLD = 4  # loads, each against the disk's rate before and after it
PROMPT = "The sea is not the land. The hotel is there, and the road is here. It is"


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        n = len(mapped)
        pages = (ctypes.c_ubyte * -(-n // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, np.uint8)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(n), pages)
        del view
        return sum(page & 1 for page in pages) / len(pages)


def read_rate(path: Path, flags: int, every: int = 1) -> float:
    """Bytes per second at which threads read every n-th block of the file into memory of their own."""
    blocks = range(0, path.stat().st_size // BLOCK, every)

    def read(first: int) -> None:
        file = os.open(path, os.O_RDONLY | flags)
        with mmap.mmap(-1, BLOCK) as buffer:
            for block in blocks[first::N_THREAD]:
                os.preadv(file, [buffer], block * BLOCK)
        os.close(file)

    start = time.perf_counter()
    with ThreadPoolExecutor(N_THREAD) as pool:
        list(pool.map(read, range(N_THREAD)))
    return len(blocks) * BLOCK / (time.perf_counter() - start)


def copy_rate() -> float:
    source, target = (torch.ones(1 << 30, dtype=torch.uint8) for _ in range(2))
    cpu, best = CpuKernels(len(os.sched_getaffinity(0))), 0.0
    for _ in range(3):
        start = time.perf_counter()
        cpu.copy(target, source)
        best = max(best, source.numel() / (time.perf_counter() - start))
    return best


def load(path: Path, options: dict[str, Any]) -> dict[str, float]:
    """Seconds, of a process that has just started."""
    n_token = 64 if options["device"] == "cuda" else 2  # plain stand-ins for kernels are slow
    start = time.perf_counter()
    last = {"bytes": 0}
    with Engine.load(path, progress=lambda done, total: last.update(bytes=done), ctx=512, **options) as engine:
        found: dict[str, float] = {"load": time.perf_counter() - start, "bytes": last["bytes"]}
        store: ExpertStore = engine.experts.store  # type: ignore[attr-defined]
        if store._locker is not None:
            n_locked = sum(map(store._locker.n_locked, range(len(store._layers))))
            found["locked_at_load"] = n_locked / sum(len(layer.rows) for layer in store._layers)
        next(engine.stream([1, 2, 3, 4], temperature=0, max_tokens=1))
        found["first_token"] = time.perf_counter() - start
        if store._locker is not None:
            # Decoding goes on meanwhile, with copies
            while store.is_locking:
                engine.generate(PROMPT, temperature=0, max_tokens=16)
                if time.perf_counter() - start > 120:
                    found["gave_up_locking"] = 1
                    break
            found["all_locked"] = time.perf_counter() - start
        result = engine.generate([1, 2, 3, 4], temperature=0, max_tokens=n_token)
        found["decode_rate"] = result.stats.decode_rate or 0.0
        found["peak_ram_bytes"] = result.stats.peak_ram_bytes
    found["gigabytes_per_second"] = found["bytes"] / found["load"] / 1e9
    return found


def in_process(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load", str(path), "--options", json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def generate(path: Path, *options: str) -> dict[str, Any]:
    """With the command line, as a user would."""
    arguments = [PROMPT, "-m", str(path), "--json", "--temperature", "0", "--max-tokens", "32", "--ctx", "512"]
    command = [sys.executable, "-m", "moe_engine", "generate", *arguments, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def budget_row(path: Path, budget: str, options: list[str]) -> dict[str, Any]:
    free, bound = generate(path, *options), generate(path, *options, "--ram-budget", budget)
    return {
        "options": options,
        "ram_budget": budget,
        "same_tokens": free["tokens"] == bound["tokens"],
        "peak_ram": {"without": free["stats"]["peak_ram_bytes"], "with": bound["stats"]["peak_ram_bytes"]},
        "decode_rate": {"without": free["stats"]["decode_rate"], "with": bound["stats"]["decode_rate"]},
        "prompt_rate": {"without": free["stats"]["prompt_rate"], "with": bound["stats"]["prompt_rate"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/moe_engine_bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load, options.options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": "python bench/bench_load.py",
        "gpu": "none" if options.tiny else torch.cuda.get_device_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }

    def note(name: str, measure: Callable[[], Any]) -> None:
        results[name] = measure()
        print(f"{name}: {results[name]}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")

    loaded = options.work / "load-qwen3-30b-a3b.gguf"
    with written("qwen3-30b-a3b", loaded, layers=2 if options.tiny else None):
        loads(loaded, results, note, options.tiny)
    bounded = options.work / "load-deepseek-v2-lite.gguf"
    with written("deepseek-v2-lite", bounded, layers=3 if options.tiny else 27):
        budgets(bounded, note, options.tiny)


def loads(path: Path, results: dict[str, Any], note: Note, tiny: bool) -> None:
    """Cold and warm ones, each with what disk and page cache give."""
    note("file_bytes", lambda: path.stat().st_size)
    drop_cache(path)
    note("cached_share_when_cold", lambda: cached_share(path))
    note("copy_rate", copy_rate)
    engine_options = {"device": "simulated" if tiny else "cuda", "vram_budget": "2GiB" if tiny else "8GiB"}
    in_process(path, engine_options)  # compiles kernels

    def disk_rate() -> float:
        drop_cache(path)
        return read_rate(path, os.O_DIRECT, every=4)

    shares: list[float] = []
    note("disk_rate_0", disk_rate)  # others may share the disk: measured before and after each cold load
    for turn in range(1, N_COLD + 1):
        drop_cache(path)
        note(f"cold_{turn}", lambda: in_process(path, engine_options))
        note(f"disk_rate_{turn}", disk_rate)
        around = (results[f"disk_rate_{turn - 1}"] + results[f"disk_rate_{turn}"]) / 2
        shares.append(results["file_bytes"] / results[f"cold_{turn}"]["load"] / around)
    note("cold_shares", lambda: shares)
    note("cold_share", lambda: statistics.median(shares))
    note("cache_rate", lambda: (read_rate(path, 0), read_rate(path, 0))[1])
    note("cached_share_when_warm", lambda: cached_share(path))
    for turn in (1, 2):
        note(f"warm_{turn}", lambda: in_process(path, engine_options))
    rates = [results["file_bytes"] / results[f"warm_{turn}"]["load"] for turn in (1, 2)]
    note("warm_shares", lambda: [rate / results["cache_rate"] for rate in rates])


def budgets(path: Path, note: Note, tiny: bool) -> None:
    """The same tokens with less RAM than the file."""
    print(f"{path.name}: {format_size(path.stat().st_size)}", flush=True)
    budget, rows = ("1800MiB", [[]]) if tiny else ("4GiB", [["--exact"], ["--miss", "cpu"]])
    shared = ["--device", "cpu"] if tiny else ["--device", "cuda", "--vram-budget", "3GiB"]
    for row in rows:
        note(" ".join(["budget", *row]), partial(budget_row, path, budget, [*shared, *row]))


if __name__ == "__main__":
    main()
