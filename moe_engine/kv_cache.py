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
    """The cache of one sequence, `capacity` tokens long.

    kv_dtype: "f16", "bf16" or "f32".
    """

    def __init__(self, shapes: list[TokenShapes], capacity: int, kv_dtype: str, device: torch.device) -> None:
        self.capacity = capacity
        self.layers = [
            LayerCache(tuple(torch.zeros(capacity, *shape, dtype=_TYPES[kv_dtype], device=device) for shape in layer))
            for layer in shapes
        ]


def element_bytes(kv_dtype: str) -> int:
    """Bytes of one cached value."""
    return _TYPES[kv_dtype].itemsize
