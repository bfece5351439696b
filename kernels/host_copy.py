"""Small things from the host to the GPU without the copy engine, which may be busy with experts for a while."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.device import cdiv
from moe_engine.kernels.launch import launched

_BLOCK = 4096


@launched
@triton.jit
def _copy_kernel(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)


def upload(source: Tensor, device: torch.device) -> Tensor:
    """A copy of `source`, int32 or f32, contiguous and page-locked, on the device; in order of the current stream.

    A kernel reads it over the bus, some time later: until then the source must stay as it is.
    """
    target = torch.empty(source.shape, dtype=source.dtype, device=device)
    if device.type != "cuda":
        return target.copy_(source)
    with torch.cuda.device(device):
        _copy_kernel[(cdiv(source.numel(), _BLOCK),)](source, target, source.numel(), BLOCK=_BLOCK)
    return target
