"""Where the Triton kernels run, and what lies there for them. Triton is imported only if it may be interpreted."""

import os
from functools import cache

import torch

from moe_engine.kernels import codebooks


@cache
def is_interpreted() -> bool:
    """Whether the kernels were decorated for Triton's interpreter, which also takes CPU tensors."""
    if "TRITON_INTERPRET" not in os.environ:
        return False
    from moe_engine.kernels.dequantize_kernel import INTERPRETED

    return bool(INTERPRETED.value)


def run_kernels(tensor: torch.Tensor) -> bool:
    """Otherwise, with neither a GPU nor Triton's interpreter, the plain versions of reference.py answer."""
    return tensor.is_cuda or is_interpreted()


@cache
def table(type_id: int, device: torch.device) -> torch.Tensor:
    """The type's codebook on `device`: int8, flat. Types without one get a stand-in that is never read."""
    if not codebooks.has_codebook(type_id):
        return torch.zeros(1, dtype=torch.int8, device=device)
    return torch.tensor(codebooks.codebook(type_id).ravel(), device=device)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a kernel's program may have on the chip; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 30
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


# Triton's functions of these names may be called in kernels, too, and take ten times as long or more outside of them.
def cdiv(n: int, size: int) -> int:
    """How many pieces of a size hold n."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is over 0."""
    return 1 << (n - 1).bit_length()
