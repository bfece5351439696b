"""Times the dequantization of one layer's experts, each type to bf16, f16 and f32, against a copy on the same device.

    python bench/bench_dequantize.py            # needs a CUDA device
    python bench/bench_dequantize.py --tiny     # a dry run on any machine, nothing timed

GB/s counts the quantized bytes read and the bytes written; the copy, of floats of the same dtype, is counted alike
(read + written), and its time is the reference. The experts of a layer repeat one expert of random blocks, at places of
their own: a call reads and writes several times what the last-level cache holds. Values are compared with the gguf
package's first.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from moe_engine.kernels import dequantize
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QuantType

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from random_blocks import random_blocks

Shape = tuple[int, int, int]
QWEN3_30B_A3B = (128, 768, 2048)  # experts, rows, elements of a row
TINY = (2, 3, 256)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
OFFSET = 16  # bytes before the first block


def checked_experts(type: QuantType, shape: Shape, offset: int, device: torch.device) -> QuantTensor:
    """A stack of equal experts that starts `offset` bytes into its buffer; the last one is checked."""
    n_expert, n_out, n_in = shape
    one = random_blocks(type, n_out, n_in, np.random.default_rng(0))
    values = torch.tensor(quants.dequantize(one, GGMLQuantizationType(type.id)), device=device)
    buffer = torch.empty(offset + n_expert * one.size, dtype=torch.uint8, device=device)
    data = buffer[offset:].view(n_expert, *one.shape)
    data.copy_(torch.tensor(one, device=device).expand(n_expert, -1, -1))
    weight = QuantTensor(data, type, n_in)
    for dtype in DTYPES.values():
        if not torch.equal(dequantize.dequantize(weight, dtype=dtype)[-1], values.to(dtype)):
            raise SystemExit(f"{type} to {dtype}: differs from the reference")
    return weight


def _microseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return 1000 * float(do_bench(run, warmup=5, rep=25, return_mode="median"))


def results(
    types: Sequence[str] | None = None, shape: Shape = QWEN3_30B_A3B, offset: int = OFFSET
) -> list[dict[str, Any]]:
    """One row for each type (all by default) and dtype; first the copies, whose `type` is empty."""
    device = torch.device("cuda")
    rows: list[dict[str, Any]] = []
    copies: dict[str, tuple[float, float]] = {}  # GB/s, microseconds

    def add(kernel: str, type: str, dtype: str, us: float, n_bytes: int) -> None:
        rate = n_bytes / us / 1e3
        copy_rate, copy_us = copies.setdefault(dtype, (rate, us))
        row = {"kernel": kernel, "type": type, "shape": list(shape), "microseconds": round(us, 1)}
        row |= {"reference_microseconds": round(copy_us, 1), "gb_per_s": round(rate)}
        rows.append(row | {"share_of_copy": round(rate / copy_rate, 3)})

    outputs = {name: torch.empty(shape, device=device, dtype=dtype) for name, dtype in DTYPES.items()}
    for name, out in outputs.items():
        add(f"copy {name}", "", name, _microseconds(partial(out.copy_, torch.empty_like(out))), 2 * out.nbytes)
    for type in types or BY_NAME:
        weight = checked_experts(BY_NAME[type], shape, offset, device)
        for name, out in outputs.items():
            us = _microseconds(partial(dequantize.dequantize, weight, out=out))
            add(f"dequantize to {name}", type, name, us, weight.nbytes + out.nbytes)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each type: time, rate and share of the copy for each dtype."""
    print(f"{'':8}" + "".join(f"{f'{name}: us':>10} {'GB/s':>6} {'share':>6}" for name in DTYPES))
    for type in dict.fromkeys(row["type"] for row in rows):
        cells = [row for row in rows if row["type"] == type]
        texts = [f"{row['microseconds']:10.1f} {row['gb_per_s']:6} {row['share_of_copy']:6.0%}" for row in cells]
        print(f"{type or 'copy':8}" + "".join(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="check every type on a small stack, without timing")
    parser.add_argument("--types", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="TYPE")
    parser.add_argument("--offset", type=int, default=OFFSET, help=f"bytes before the first block (default {OFFSET})")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    if arguments.tiny:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
        for name in arguments.types:
            checked_experts(BY_NAME[name], TINY, arguments.offset, device)
            print(f"{name:8} equals the reference")
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --tiny runs here")
    rows = results(arguments.types, offset=arguments.offset)
    device_name = torch.cuda.get_device_name()
    print(f"{device_name}, torch {torch.__version__}, experts {QWEN3_30B_A3B}, offset {arguments.offset}")
    print_table(rows)
    if arguments.json:
        report = {"device": device_name, "torch": torch.__version__, "offset": arguments.offset, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
