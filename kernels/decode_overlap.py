"""Kernels that start while the one before them still runs (programmatic dependent launch, NVIDIA from Hopper on).

A kernel with the constant OVERLAP, launched with `overlap_options`, first calls `wait_for_previous_kernel`, and
computes the addresses of all that other kernels read or write with the zero it returns: nothing else keeps those
accesses from moving up. Only then it calls `let_next_kernel_start`, so at most two kernels of a stream run at once, and
the later one begins after all before the earlier one have ended. Constants, like weights, may be read before the wait.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@cache
def can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def overlap_options(device: torch.device) -> dict[str, Any]:
    """For the launch of a kernel that does as this module says."""
    return {"OVERLAP": True, "launch_pdl": True} if can_overlap(device) else {"OVERLAP": False}


@triton.jit
def wait_for_previous_kernel(OVERLAP: tl.constexpr):
    """Zero, once the kernel launched before this one is complete and its writes are visible."""
    if OVERLAP:
        return tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return 0


@triton.jit
def let_next_kernel_start(OVERLAP: tl.constexpr):
    """Allows the next kernel's programs onto multiprocessors as soon as all programs got here or ended."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
