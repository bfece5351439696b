"""Decode speed with and without lookahead and prefetch, by cache size and by link, on a CUDA machine.

    python bench/bench_lookahead.py --work /tmp/models --out bench/results/lookahead.json [--small FILE]... [--tiny]

A random Qwen3-30B-A3B follows recorded routing, with what was predicted of it (benchmark/routing.py); the bundled model
and those of `--small` route by themselves. Each row loads once and decodes in all ways in turn. "auto" is what users
get; it decodes first, so that it has compared before it is timed. "pull" only pulls what is foreseen into the CPU's
caches, and copies nothing ahead. With a link of 25 % the decode worker's copies take as long as over a quarter of the
measured PCIe rate, to imitate a weaker host. `--tiny` is a dry run on the simulated device with few layers.
"""

import statistics
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from full_size import QWEN, ROUTING, begun, by_model, keep, options_of, vram_budget

import moe_engine
from moe_engine import Engine
from moe_engine.benchmark.routing import RecordedRouting
from moe_engine.config import PrefetchMode
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.hardware import measure
from moe_engine.inspection import inspect_file
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kernels.worker import DecodeWorker
from moe_engine.stats import Stats
from moe_engine.trial_switch import TRIAL

WAYS: dict[str, tuple[PrefetchMode, PrefetchMode]] = {  # lookahead, prefetch
    "auto": ("auto", "auto"),
    "off": ("off", "off"),
    "pull": ("always", "off"),
    "always": ("always", "always"),
}
SHARES, LINKS = (0.1, 0.25, 0.5), (1.0, 0.25)
SHORTER = 20  # times as many runs of small models, which take some milliseconds each
SMALL = Path(moe_engine.__file__).parent / "data" / "stories-deepseek-Q4_K_M.gguf"


@dataclass(frozen=True)
class Row:
    model: str
    share: float  # of the experts in VRAM
    link: float = 1.0  # of the PCIe rate

    @property
    def name(self) -> str:
        return f"{self.model} {self.share:.0%} link {self.link:.0%}"


def rows_of(options: Namespace) -> Iterator[tuple[Path, Row]]:
    for path, rows in by_model([Row(QWEN, share, link) for link in LINKS for share in SHARES], options):
        yield from ((path, row) for row in rows)
    for path in (SMALL, *options.small):
        yield from ((path, Row(path.stem, share)) for share in SHARES)


def run(path: Path, row: Row, device: str, copy_rate: float, n_decode: int, repeats: int) -> dict[str, Any]:
    follows = row.model == QWEN
    options: dict[str, Any] = {"device": device, "experts": "cache", "ctx": 3 * TRIAL + 128}
    if follows:
        options["vram_budget"] = vram_budget(path, row.share, **options)
    else:  # the least budget would hold more
        file = inspect_file(path)
        options["cache_slots"] = round(row.share * file.routed_bytes / sum(file.expert_bytes))
    worker = partial(DecodeWorker, copy_rate=row.link * copy_rate if row.link < 1 else None)
    with (
        patch("moe_engine.graph_decoder.DecodeWorker", worker),
        Engine.load(path, profile=False, **options) as engine,
    ):
        decoder = engine.decoder
        assert isinstance(decoder, GraphDecoder)
        if follows:
            RecordedRouting.load(ROUTING).follow(decoder.step)

        def decode(way: str, n: int) -> Stats:
            decoder.lookahead.mode, decoder.prefetch.mode = WAYS[way]
            return engine.generate([5, 6, 7, 8], temperature=0, max_tokens=n, ignore_eos=True).stats

        decode("auto", n_decode if device == "simulated" else 3 * TRIAL + 32)
        for way in ("off", "pull", "always"):  # their steps are captured
            decode(way, min(16, n_decode))
        stats: dict[str, list[Stats]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                stats[way].append(decode(way, n_decode))
        decoder.worker.settle()
        decoder.worker.check_integrity()
        pays = decoder.prefetch.pays
    found = {"row": row.name, "auto_prefetches": pays, "ways": {way: way_of(of_way) for way, of_way in stats.items()}}
    print(found, flush=True)
    return found


def way_of(runs: list[Stats]) -> dict[str, Any]:
    """Rates of all runs; of the middle one what was foreseen and fetched, counts per step."""
    rates = [stats.decode_rate or 0.0 for stats in runs]
    middle = runs[rates.index(statistics.median_low(rates))]
    steps = max(1, middle.steps)
    foreseen, expected, missed = (sum(n) for n in (middle.layer_foreseen, middle.layer_expected, middle.layer_missed))
    return {
        "tokens_per_second": statistics.median(rates),
        "all": rates,
        "hit_rate": middle.hit_rate,
        "recall": foreseen / max(1, missed),
        "precision": foreseen / max(1, expected),
        "pulled_bytes": middle.pulled_bytes / steps,
        "cpu_bytes": middle.cpu_bytes / steps,
        "copied_bytes": middle.pcie_bytes / steps,
        "prefetched": sum(middle.layer_prefetched) / steps,
        "in_time": sum(middle.layer_in_time) / steps,
    }


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--small", type=Path, action="append", default=[], help="another trained model")
    options = parser.parse_args()
    device = "simulated" if options.tiny else "cuda"
    copy_rate = measure(torch.device("cpu" if options.tiny else device), CpuKernels(threads=1)).pcie
    results = begun("python bench/bench_lookahead.py", options) | {"copy_gb_per_s": copy_rate * 1e-9}
    for path, row in rows_of(options):
        repeats = options.repeats * (1 if row.model == QWEN else SHORTER)
        sizes = (3, 1) if options.tiny else (options.tokens, repeats)
        results["rows"].append(run(path, row, device, copy_rate, *sizes))
        keep(results, options.out)


if __name__ == "__main__":
    main()
