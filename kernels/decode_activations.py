"""Activations rounded to 8 bits in runs of 16, as the products with quantized weights take them."""

from dataclasses import dataclass

import torch
from torch import Tensor

RUN = 16
"""Activations that share a scale."""


@dataclass(frozen=True)
class Activations:
    """Rows of 8-bit activations.

    codes: int8 `[n_row, n]`. pairs: f32 `[n_row, n / 16, 2]`, each run's scale and that times the sum of its codes.
    """

    codes: Tensor
    pairs: Tensor

    @classmethod
    def empty(cls, n_row: int, n: int, device: torch.device) -> "Activations":
        codes = torch.empty(n_row, n, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(n_row, n // RUN, 2, dtype=torch.float32, device=device))

    def values(self) -> Tensor:
        """What they stand for, f32 `[n_row, n]`: for tests."""
        runs: Tensor = self.codes.unflatten(1, (-1, RUN)) * self.pairs[..., :1]
        return runs.flatten(1)


def quantize(x: Tensor, out: Activations | None = None) -> Activations:
    """x, float `[n_row, n]` or `[n_batch, n_row, n]` with contiguous rows and n a multiple of 16, as 8-bit activations
    (with the batch's rows one after the other).
    """
    from moe_engine.kernels.decode_activations_kernel import quantize_kernel
    from moe_engine.kernels.decode_overlap import overlap_options

    assert x.dim() in (2, 3), x.shape
    assert x.stride(-1) == 1, x.stride()
    *_, n_row, n = x.shape
    assert n % RUN == 0, x.shape
    if out is None:
        out = Activations.empty(x.numel() // n, n, x.device)
    assert out.codes.shape == (x.numel() // n, n), (out.codes.shape, x.shape)
    n_run = x.numel() // RUN
    runs = 32  # 512 elements a program: 1.0 us for 2048 elements, 1.4 for 7168 on an H200, all of it latency
    with torch.cuda.device_of(x):
        quantize_kernel[(-(-n_run // runs),)](
            x,
            out.codes,
            out.pairs,
            n_run,
            n_row,
            x.stride(0) if x.dim() == 3 else 0,
            x.stride(-2),
            RUNS_PER_ROW=n // RUN,
            RUNS=runs,
            num_warps=4,
            enable_fp_fusion=True,
            **overlap_options(x.device),
        )
    return out
