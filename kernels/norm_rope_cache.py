"""What the rows of a KV cache are kept in."""

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Q8Cache(NamedTuple):
    """Cached rows in Q8_0 as two planes: in 34-byte blocks no wide load would find the integers aligned."""

    values: Tensor  # int8 [..., d]
    scales: Tensor  # f16 [..., d / 32]

    @classmethod
    def zeros(cls, *shape: int, device: torch.device | str | None = None) -> "Q8Cache":
        assert shape[-1] % 32 == 0, f"rows of {shape[-1]} values are not whole blocks of 32"
        values = torch.zeros(shape, dtype=torch.int8, device=device)
        return cls(values, torch.zeros(*shape[:-1], shape[-1] // 32, dtype=torch.float16, device=device))


Cache = Tensor | Q8Cache
"""One of a layer's cached tensors (f16, bf16, f32 or Q8_0), contiguous `[capacity, n_kv_head, d]`, or with a dimension
`n_sequence` in front. MLA's has no dimension for heads."""


Index = int | slice | tuple[slice, ...]


def part(cache: Cache, index: Index) -> Cache:
    """A view of some of the rows: any index that leaves the last dimension alone."""
    return Q8Cache(*(plane[index] for plane in cache)) if isinstance(cache, Q8Cache) else cache[index]


def planes(cache: Cache) -> tuple[Tensor, Tensor]:
    """Values and scales; without scales the values stand in for them and are never read."""
    values, scales = cache if isinstance(cache, Q8Cache) else (cache, cache)
    assert values.is_contiguous()
    assert scales.is_contiguous()
    assert isinstance(cache, Q8Cache) or values.dtype in FLOATS, values.dtype
    return values, scales


def quantize_reference(x: Tensor) -> Q8Cache:
    """Q8_0 of f32 `[..., d]`: the largest magnitude of 32 values becomes 127, halves are rounded away from zero."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    scaled = blocks * torch.where(scale > 0, 1 / scale, 0.0)
    whole = (scaled.abs() + 0.5).floor().copysign(scaled)
    return Q8Cache(whole.to(torch.int8).flatten(-2), scale[..., 0].half())


def cached_floats(cache: Cache) -> Tensor:
    """What a cache holds, f32."""
    if isinstance(cache, Q8Cache):
        blocks: Tensor = cache.values.unflatten(-1, (-1, 32)) * cache.scales[..., None].float()
        return blocks.flatten(-2)
    return cache.float()


def half_type(cache: Cache) -> torch.dtype:
    """What tensor cores multiply it as: bf16 if it is, else f16."""
    return torch.bfloat16 if isinstance(cache, Tensor) and cache.dtype == torch.bfloat16 else torch.float16


def is_half(cache: Cache) -> bool:
    """Whether they can as it is."""
    return isinstance(cache, Tensor) and cache.dtype == half_type(cache)


def cached_halves(cache: Cache) -> Tensor:
    """What a cache holds as the tensor cores take it: f16 and bf16 as they are, others rounded to f16."""
    if isinstance(cache, Q8Cache):
        blocks: Tensor = cache.values.unflatten(-1, (-1, 32)) * cache.scales[..., None]
        return blocks.flatten(-2)
    return cache.to(half_type(cache))
