"""Compares ways to cut the decode products of several tokens into programs: what decode_tiles.py chooses among.

    python bench/bench_decode_tiles.py           # needs a CUDA device; about a minute, most of it compiling
    python bench/bench_decode_tiles.py --tiny    # a dry run on any machine, of few forms: checked, not timed

Dense products of attention and routed experts of Qwen3-30B-A3B Q4_K_M, in CUDA graphs that read more than the cache
holds. Every form is compared with its exact result first. A row without a form is what the engine does. Nothing is
written.
"""

import argparse
import os
from functools import partial
from typing import Any

import torch

if not torch.cuda.is_available():  # must be known before the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench_decode_product import Forms, experts, replaced
from gpu_timing import DEVICE, Report, check, copies, exact_values, randn, random_weight

from moe_engine.kernels.decode_product import matvecs, quantize
from moe_engine.kernels.quant_tensor import QuantTensor

Heights = tuple[tuple[str, int], ...]
QKV: Heights = (("Q4_K", 4096), ("Q4_K", 512), ("Q6_K", 512))
OUTPUT: Heights = (("Q4_K", 2048),)
TINY: Heights = (("Q4_K", 48), ("Q6_K", 20))


def matvec_form(tokens: int, rows: int, lanes: int = 32, warps: int = 1) -> dict[str, Any]:
    tile = {"TOKENS": tokens, "ROWS": rows, "LANES": lanes, "UNROLL": 1, "PREFETCH": True, "num_warps": warps}
    return {"matvec_tile": lambda *_: tile}


DENSE: Forms = {
    "": {},
    ", tensor cores from five tokens on": {"FEW_ROWS": 0},
    ", 4 tokens and 2 rows a program": matvec_form(4, 2),
    ", 4 tokens and 4 rows": matvec_form(4, 4),
    ", 8 tokens and 2 rows": matvec_form(8, 2),
    ", 8 tokens and 4 rows": matvec_form(8, 4),
    ", 8 tokens and 4 rows, two warps": matvec_form(8, 4, 64, 2),
}


def side_by_side(rows: int, lanes_a_warp: int) -> dict[str, Any]:
    def tile(n_token: int, top_k: int, n_unit: int) -> dict[str, Any]:
        width = 8 if n_unit % 8 == 0 else 4
        lanes = width * (1 << (top_k - 1).bit_length())
        return {"WIDTH": width, "ROWS": rows, "LANES": lanes, "UNROLL": 3, "num_warps": max(1, lanes // lanes_a_warp)}

    return {"down_tile": tile}


def gate_up(unroll: int, warps: int) -> dict[str, Any]:
    return {"gate_up_tile": lambda: {"ROWS": 16, "LANES": 32, "UNROLL": unroll, "num_warps": warps}}


LONG_ROW = {"WIDTH": 0, "ROWS": 8, "LANES": 64, "UNROLL": 1, "num_warps": 8}
ROUTED: Forms = {
    "": {},
    ", down with one long row": {"down_tile": lambda *_: LONG_ROW},
    ", down with choices side by side": side_by_side(8, 8),
    ", the same with half the warps": side_by_side(8, 16),
    ", the same with twice the rows": side_by_side(16, 8),
    ", gate and up with half the warps, two turns at once": gate_up(2, 4),
    ", gate and up with two turns at once": gate_up(2, 8),
}


def dense(report: Report, name: str, heights: Heights, n_in: int, tokens: tuple[int, ...], forms: Forms) -> None:
    weights = [random_weight(type, n_out, n_in) for type, n_out in heights]
    exact_weights = torch.cat([exact_values(weight) for weight in weights])
    n_bytes = sum(weight.nbytes for weight in weights)
    turns = [
        [QuantTensor(weight.data.clone(), weight.type, n_in) for weight in weights] for _ in range(copies(n_bytes))
    ]
    for n_token in tokens:
        x = randn(n_token, n_in)
        out, rounded = torch.empty(n_token, len(exact_weights), device=DEVICE), quantize(x)
        exact = x.double() @ exact_weights.T
        for form, tiles in forms.items():
            with replaced(tiles):
                matvecs(x, weights, out, rounded)
                report.add(
                    "matrices",
                    "/".join(type for type, _ in heights),
                    f"{name}, {n_token} tokens{form}",
                    [partial(matvecs, x, some, out, rounded) for some in turns],
                    error=check(name, out, exact, 1e-2),
                    n_bytes=n_bytes,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    report = Report("decode tiles")
    if parser.parse_args().tiny:
        dense(report, "tiny", TINY, 512, (6,), dict(list(DENSE.items())[:3]))
        experts(report, "tiny", "Q4_K/Q6_K", (5,))
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --tiny runs here")
    dense(report, "q, k, v", QKV, 2048, (4, 8, 16), DENSE)
    dense(report, "output", OUTPUT, 4096, (4, 8, 16), DENSE)
    for types in ("Q4_K/Q4_K", "Q4_K/Q6_K"):
        experts(report, "Qwen3-30B-A3B", types, (1, 4, 8, 16), ROUTED)


if __name__ == "__main__":
    main()
