"""Hands the tensors of a file to the model: every shape checked, every tensor accounted for."""

import re

import torch
from torch import Tensor

from moe_engine.backend import Backend, Embedding, FeedForwardWeights, Linear
from moe_engine.errors import ModelFormatError, UnsupportedModelError
from moe_engine.gguf_file import GGUFFile
from moe_engine.kernels.quant_tensor import QuantTensor


class Weights:
    """The tensors of `file` on `backend`, asked for by name with the shape that the caller expects (torch order).

    Raises `ModelFormatError` for a missing tensor or a wrong shape, `UnsupportedModelError` for a type this
    version cannot compute with.
    """

    def __init__(self, file: GGUFFile, backend: Backend) -> None:
        self.file, self.backend = file, backend
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in torch's order, without looking at the data."""
        info = self.file.tensors.get(name)
        if info is None:
            raise ModelFormatError(
                f"{self.file.path}: tensor '{name}' is missing, but architecture '{self.file.architecture}' needs it"
            )
        return info.shape

    def quantized(self, name: str, shape: tuple[int, ...]) -> QuantTensor:
        """The tensor as the file holds it: a view of the mapping, in RAM."""
        found = self.shape(name)
        if found != shape and [n for n in found if n > 1] != [n for n in shape if n > 1]:
            raise ModelFormatError(f"{self.file.path}: tensor '{name}' has the shape {found}, expected {shape}")
        self._used.add(name)
        tensor = self.file.tensor(name)
        if found != shape:  # unit dimensions come and go between converters
            tensor = QuantTensor(tensor.data.view(*shape[:-1], -1), tensor.type, shape[-1])
        return tensor

    def linear(self, name: str, n_out: int, n_in: int) -> Linear:
        return self.backend.linear(self.quantized(name, (n_out, n_in)))

    def feed_forward(self, prefix: str, suffix: str, n_ff: int, hidden: int) -> FeedForwardWeights:
        gate = self.quantized(f"{prefix}ffn_gate{suffix}.weight", (n_ff, hidden))
        up = self.quantized(f"{prefix}ffn_up{suffix}.weight", (n_ff, hidden))
        return self.backend.feed_forward(gate, up, self.quantized(f"{prefix}ffn_down{suffix}.weight", (hidden, n_ff)))

    def embedding(self, name: str, n_vocab: int, hidden: int) -> Embedding:
        return self.backend.embedding(self.quantized(name, (n_vocab, hidden)))

    def floats(self, name: str, *shape: int) -> Tensor:
        """A small tensor (norm, bias, router) as f32 on the backend's device."""
        tensor = self.quantized(name, shape)
        rows = QuantTensor(tensor.data.reshape(-1, tensor.data.shape[-1]), tensor.type, tensor.n_in)
        return self.backend.dequantize(rows).view(shape)

    def optional_floats(self, name: str, *shape: int) -> Tensor | None:
        return self.floats(name, *shape) if self.has(name) else None

    def split_rows(self, name: str, sizes: tuple[int, ...], n_in: int) -> list[QuantTensor]:
        """A fused tensor cut along its rows (for stacks: the rows of each matrix)."""
        stack = self.shape(name)[:-2]
        fused = self.quantized(name, (*stack, sum(sizes), n_in))
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [fused.rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def experts(self, prefix: str, n_expert: int, hidden: int) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
        """Gate and up `[n_expert, n_ff, hidden]` and down `[n_expert, hidden, n_ff]` of one layer, in RAM."""
        n_ff = self.shape(f"{prefix}ffn_down_exps.weight")[-1]
        down = self.quantized(f"{prefix}ffn_down_exps.weight", (n_expert, hidden, n_ff))
        fused = f"{prefix}ffn_gate_up_exps.weight"
        if self.has(fused):
            gate, up = self.split_rows(fused, (n_ff, n_ff), hidden)
            if gate.shape[0] != n_expert:
                raise ModelFormatError(
                    f"{self.file.path}: tensor '{fused}' holds {gate.shape[0]} experts, expected {n_expert}"
                )
        else:
            gate = self.quantized(f"{prefix}ffn_gate_exps.weight", (n_expert, n_ff, hidden))
            up = self.quantized(f"{prefix}ffn_up_exps.weight", (n_expert, n_ff, hidden))
        return gate, up, down

    def ignore(self, name: str) -> None:
        """Marks a tensor as known and not needed."""
        self._used.add(name)

    def check_all_used(self, n_layer: int) -> None:
        """Raises if the file holds tensors the model did not take: its results would silently be wrong.

        Blocks from `n_layer` on (multi-token prediction) are not part of normal inference.
        """
        for name in self.file.tensors:
            block = re.match(r"blk\.(\d+)\.", name)
            if name in self._used or (block and int(block[1]) >= n_layer):
                continue
            raise UnsupportedModelError(
                f"{self.file.path}: tensor '{name}' is not part of architecture '{self.file.architecture}' as this "
                "version knows it: without it the results would be wrong"
            )
