"""Keys and values (or latents) of the tokens seen so far, for all layers, allocated once."""

import torch
from torch import Tensor

_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

TokenShapes = tuple[tuple[int, ...], ...]
"""What one layer keeps per token: the shapes of its tensors, such as `((n_kv_head, head_dim),) * 2`."""


class LayerCache:
    """One layer's tensors, each `[capacity, *shape]`."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def append(self, position: int, *rows: Tensor) -> tuple[Tensor, ...]:
        """Stores rows `[n_token, *shape]` from `position` on; returns all rows up to them, as f32."""
        end = position + rows[0].shape[0]
        for tensor, new in zip(self.tensors, rows, strict=True):
            tensor[position:end] = new
        return tuple(tensor[:end].float() for tensor in self.tensors)


class KVCache:
    """The caches of `n_sequence` sequences, each `capacity` tokens long.

    kv_dtype: "f16", "bf16" or "f32". `tensors`: per layer, each `[n_sequence, capacity, *shape]`.
    """

    def __init__(
        self, shapes: list[TokenShapes], n_sequence: int, capacity: int, kv_dtype: str, device: torch.device
    ) -> None:
        self.n_sequence, self.capacity = n_sequence, capacity
        self.tensors = [
            tuple(torch.zeros(n_sequence, capacity, *shape, dtype=_TYPES[kv_dtype], device=device) for shape in layer)
            for layer in shapes
        ]

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return sum(tensor[0, 0].nbytes for layer in self.tensors for tensor in layer)

    def sequence(self, index: int) -> list[LayerCache]:
        """One sequence's layers (views)."""
        return [LayerCache(tuple(tensor[index] for tensor in layer)) for layer in self.tensors]


def element_bytes(kv_dtype: str) -> int:
    """Bytes of one cached value."""
    return _TYPES[kv_dtype].itemsize
