"""A matrix, or a stack of them, kept as the quantized bytes of the GGUF file."""

from dataclasses import dataclass

import torch

from moe_engine.kernels.quant_types import QuantType


@dataclass(frozen=True)
class QuantTensor:
    """Rows of quantized blocks.

    `data` is uint8 `[..., n_out, row_bytes]`, with contiguous rows, on any device (for the CPU usually a
    read-only view of the mapped file: never write to it). `n_in` is the number of elements of a row.
    """

    data: torch.Tensor
    type: QuantType
    n_in: int

    def __post_init__(self) -> None:
        assert self.data.dtype == torch.uint8, self.data.dtype
        assert self.data.shape[-1] == self.type.row_bytes(self.n_in), (self.data.shape, self.type, self.n_in)

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements: `(..., n_out, n_in)`."""
        return (*self.data.shape[:-1], self.n_in)

    @property
    def n_out(self) -> int:
        return self.data.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def rows(self, start: int, stop: int) -> "QuantTensor":
        """Rows `start` to `stop` of a matrix, or of each matrix of a stack (a view)."""
        return QuantTensor(self.data[..., start:stop, :], self.type, self.n_in)

    def __getitem__(self, index: int | slice) -> "QuantTensor":
        """Matrix `index` of a stack, or some of them (a view)."""
        return QuantTensor(self.data[index], self.type, self.n_in)

    def to(self, device: torch.device) -> "QuantTensor":
        return QuantTensor(self.data.to(device), self.type, self.n_in)
