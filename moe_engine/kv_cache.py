"""Keys and values (or latents) of the tokens seen so far, for all layers, allocated once."""

import torch
from torch import Tensor

from moe_engine.errors import ConfigError
from moe_engine.kernels.norm_rope_cache import Cache, Q8Cache, cached_floats, part, quantize_reference

_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

TokenShapes = tuple[tuple[int, ...], ...]
"""What one layer keeps per token: the shapes of its tensors, such as `((n_kv_head, head_dim),) * 2`."""


class LayerCache:
    """One sequence's rows of one layer: `tensors`, each `[1, capacity, *shape]`."""

    def __init__(self, tensors: tuple[Cache, ...]) -> None:
        self.tensors = tensors

    def append(self, position: int, *rows: Tensor) -> tuple[Tensor, ...]:
        """Stores rows f32 `[n_token, *shape]` from `position` on; returns all rows up to them, as f32.

        For plain arithmetic; fused kernels write to the tensors, and read them, themselves.
        """
        end = position + rows[0].shape[0]
        for tensor, new in zip(self.tensors, rows, strict=True):
            place = part(tensor, (slice(0, 1), slice(position, end)))
            if isinstance(place, Q8Cache):
                for plane, values in zip(place, quantize_reference(new), strict=True):
                    plane.copy_(values)
            else:
                place.copy_(new)
        return tuple(cached_floats(part(part(tensor, 0), slice(end))) for tensor in self.tensors)


class KVCache:
    """The caches of `n_sequence` sequences, each `capacity` tokens long.

    kv_dtype: "f16", "bf16", "f32" or "q8_0". `tensors`: per layer, each `[n_sequence, capacity, *shape]`.
    Raises `ConfigError` if rows are not whole blocks of the type.
    """

    def __init__(
        self, shapes: list[TokenShapes], n_sequence: int, capacity: int, kv_dtype: str, device: torch.device
    ) -> None:
        self.n_sequence, self.capacity = n_sequence, capacity
        self.tensors = [
            tuple(_zeros((n_sequence, capacity, *shape), kv_dtype, device) for shape in layer) for layer in shapes
        ]

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        caches = [part(cache, (slice(0, 1), slice(0, 1))) for layer in self.tensors for cache in layer]
        return sum(plane.nbytes for cache in caches for plane in (cache if isinstance(cache, Q8Cache) else (cache,)))

    def sequence(self, index: int) -> list[LayerCache]:
        """One sequence's layers (views)."""
        return [LayerCache(tuple(part(cache, slice(index, index + 1)) for cache in layer)) for layer in self.tensors]

    def first(self, n_sequence: int) -> list[tuple[Cache, ...]]:
        """The layers of the first sequences (views `[n_sequence, capacity, *shape]`)."""
        return [tuple(part(cache, slice(n_sequence)) for cache in layer) for layer in self.tensors]


def _zeros(shape: tuple[int, ...], kv_dtype: str, device: torch.device) -> Cache:
    if kv_dtype != "q8_0":
        return torch.zeros(shape, dtype=_TYPES[kv_dtype], device=device)
    if shape[-1] % 32:
        raise ConfigError(
            f"kv_dtype is 'q8_0', which keeps blocks of 32 values, but the model's rows have {shape[-1]}: use 'f16'"
        )
    return Q8Cache.zeros(*shape, device=device)


def cached_bytes(kv_dtype: str, n_value: int) -> int:
    """Bytes of this many cached values, whole blocks of them."""
    return n_value * 34 // 32 if kv_dtype == "q8_0" else n_value * _TYPES[kv_dtype].itemsize
