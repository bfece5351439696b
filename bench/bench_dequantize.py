"""Times the dequantization of one layer's experts, each type against a copy on the same device.

    python bench/bench_dequantize.py            # needs a CUDA device
    python bench/bench_dequantize.py --tiny     # a dry run on any machine, nothing timed

GB/s counts the quantized bytes read and the bytes written; the copy is counted alike (read + written). The
experts of a layer repeat one expert of random blocks, and that one is compared with the gguf package first.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from moe_engine.kernels import dequantize
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME, QUANT_TYPES, QuantType

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from random_blocks import random_blocks

QWEN3_30B_A3B = (128, 768, 2048)  # experts, rows, elements of a row
TINY = (2, 3, 256)


def experts(type: QuantType, shape: tuple[int, int, int], offset: int, device: torch.device) -> QuantTensor:
    """A stack of equal experts that starts `offset` bytes into its buffer; the first one is checked."""
    n_expert, n_out, n_in = shape
    one = random_blocks(type, n_out, n_in, np.random.default_rng(0))
    values = torch.tensor(quants.dequantize(one, GGMLQuantizationType(type.id)), device=device)
    buffer = torch.empty(offset + n_expert * one.size, dtype=torch.uint8, device=device)
    data = buffer[offset:].view(n_expert, *one.shape)
    data.copy_(torch.tensor(one, device=device).expand(n_expert, -1, -1))
    weight = QuantTensor(data, type, n_in)
    if not torch.equal(dequantize.dequantize(weight)[-1], values):
        raise SystemExit(f"{type}: differs from the reference")
    return weight


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def measure(shape: tuple[int, int, int], types: list[QuantType], offset: int, dtype: torch.dtype) -> None:
    from triton.testing import do_bench

    device = torch.device("cuda")
    out = torch.empty(shape, device=device, dtype=dtype)
    other = torch.empty_like(out)
    copy_ms = do_bench(lambda: out.copy_(other), return_mode="median")
    copy_rate = 2 * out.nbytes / copy_ms / 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, experts {shape} to {dtype}, offset {offset}")
    print(f"{'type':8} {'ms':>8} {'GB/s':>8} {'of copy':>8}")
    print(f"{'copy':8} {copy_ms:8.3f} {copy_rate:8.0f} {1:8.0%}")
    for type in types:
        weight = experts(type, shape, offset, device)

        def run(weight: QuantTensor = weight) -> None:
            dequantize.dequantize(weight, out=out)

        ms = do_bench(run, return_mode="median")
        rate = (weight.nbytes + out.nbytes) / ms / 1e6
        print(f"{type.name:8} {ms:8.3f} {rate:8.0f} {rate / copy_rate:8.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="check every type on a small stack, without timing")
    parser.add_argument("--types", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="TYPE")
    parser.add_argument("--offset", type=int, default=16, help="bytes before the first block (default 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    types = [type for type in QUANT_TYPES.values() if type.name in arguments.types]
    if arguments.tiny:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
        for type in types:
            experts(type, TINY, arguments.offset, device)
            print(f"{type.name:8} equals the reference")
    elif torch.cuda.is_available():
        measure(QWEN3_30B_A3B, types, arguments.offset, DTYPES[arguments.dtype])
    else:
        raise SystemExit("no CUDA device: only --tiny runs here")


if __name__ == "__main__":
    main()
