"""Times all GPU kernels and writes what they reach to bench/results/gpu_kernels.json.

    python bench/bench_gpu_kernels.py                     # needs a CUDA device; minutes, most of them compiling
    python bench/bench_gpu_kernels.py --only decode       # one family; its rows replace those in the file
    python bench/bench_gpu_kernels.py --tiny              # a dry run on any machine: results are checked, not timed

Every kernel is compared with its reference before it is timed, in CUDA graphs that read more than the cache holds.
`gb_per_s` is what a call reads at least over its time, `share_of_copy` the same as a share of a device-to-device copy
(bytes read + written) in the same run, `reference` the time of torch operations. `added` is what a kernel adds to those
before it in the same graph.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

if not torch.cuda.is_available():  # must be known before the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gpu_timing import Row, copy_rate, matmul_rate

FAMILIES = {
    "attention-part": "bench_attention_part",
    "decode": "bench_decode_product",
    "matvec": "bench_decode_matvec",
    "router": "bench_router_kernel",
    "norm": "bench_norm_rope",
    "attention": "bench_decode_attention",
    "sampling": "bench_sampling_kernel",
    "grouped": "bench_grouped_product",
    "prompt-attention": "bench_prompt_attention",
    "mailbox": "bench_mailbox",
    "choice": "bench_layer_choice",
    "host-copy": "bench_host_copy",
    "dequantize": "bench_dequantize",
}
RESULTS = Path(__file__).parent / "results" / "gpu_kernels.json"
COLUMNS = {  # and their decimals
    "microseconds": 1,
    "added_microseconds": 1,
    "reference_microseconds": 1,
    "gb_per_s": 0,
    "share_of_copy": 2,
    "tflops": 0,
}


def table(rows: list[Row]) -> Table:
    result = Table("family", "kernel", "type", "shape", "error")
    for name in COLUMNS:
        result.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        cells = [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in COLUMNS.items()]
        texts = [str(row.get(name, "")) for name in ("family", "kernel", "type", "shape")]
        result.add_row(*texts, f"{row['error']:.0e}" if "error" in row else "", *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, action="append", help="may be given more than once")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        raise SystemExit("no CUDA device: only --tiny runs here")
    about: dict[str, Any] = {}
    if not arguments.tiny:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        about |= {"copy_gb_per_s": copy_rate(), "bf16_matmul_tflops": matmul_rate()}
    chosen = arguments.only or list(FAMILIES)
    rows: list[Row] = []
    new: list[Row]
    for name in chosen:
        module = importlib.import_module(FAMILIES[name])
        if name == "dequantize":  # which has no GPU-less form
            new = [{"family": name} | row for row in module.results()] if not arguments.tiny else []
        else:
            new = module.results(tiny=arguments.tiny)
        for row in new:
            if "gb_per_s" in row and "share_of_copy" not in row:
                row["share_of_copy"] = row["gb_per_s"] / about["copy_gb_per_s"]
        rows += new
    Console(width=170).print(table(rows))
    if not arguments.tiny:
        if arguments.only and arguments.json.exists():
            families = {row["family"] for row in rows}
            before = json.loads(arguments.json.read_text())["rows"]
            rows = [row for row in before if row["family"] not in families] + rows
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
