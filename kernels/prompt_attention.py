"""Attention of a prompt's tokens over the KV cache on the tensor cores: grouped queries, or MLA with expanded keys.

One launch, no score matrix, keys and values read where they lie; queries may start at any position (the diagonal is at
the lower right). `attention.attention` is the definition of correct. Products are f16, or bf16 where the cache is, with
f32 sums. A cache of another type (q8_0, f32) is first written out as f16, some key heads at a time.
Source: Dao 2023 (FlashAttention-2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_engine.kernels.device import cdiv, next_power_of_2
from moe_engine.kernels.norm_rope_cache import Cache, cached_halves, is_half, part
from moe_engine.kernels.prompt_attention_kernel import prompt_attention_kernel

_LOG2_E = 1.4426950408889634

EXPANDED_BYTES = 256 << 20
"""Keys and values that are not read where they lie take at most this, at least one head's."""


@dataclass(frozen=True)
class Tuning:
    """Queries and keys of a tile, and how a program is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# TFLOP/s below the diagonal on an H200 (bench_prompt_attention.py), 2048 and 8192 tokens. Heads of 128 (Qwen3): 351
# and 463 with 128 keys, 319 and 392 with 64, 360 and 431 with 32. DeepSeek-V2-Lite: 330 and 418 with 64 keys, 330 and
# 422 with 128 in two stages, at most 258 and 309 otherwise. Fewer warps or rows were slower for both.
NARROW = Tuning(rows=128, keys=128, num_warps=8, num_stages=3)
"""For heads up to 128 values wide, keys with their shared part."""
WIDE = Tuning(rows=128, keys=64, num_warps=8, num_stages=3)
"""Up to 256."""
VERY_WIDE = Tuning(rows=64, keys=32, num_warps=4, num_stages=2)
"""Wider. Not tuned."""
FEW_ROWS = 64
"""Up to this many tokens the block of queries is as small as they are."""


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    position: int,
    *,
    query_shared: Tensor | None = None,
    key_shared: Tensor | None = None,
    out: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Causal attention of the tokens at `position` and after it, whose keys are the last: `[n_token, n_head, d_value]`.

    query: f32, f16 or bf16 `[n_token, n_head, d]`. key: f16 or bf16 `[n_key, n_kv_head, d]`, value `[n_key, n_kv_head,
    d_value]` of the same type, `n_key = position + n_token`. Query head h reads key head `h // (n_head / n_kv_head)`.
    query_shared `[n_token, n_head, d_shared]`, key_shared `[n_key, d_shared]`: more terms of the dot products, with one
    key for all heads. Strides are free but for the last dimension. scale: over 0. out: default bf16.
    """
    n_token, n_head, d = query.shape
    n_key, n_kv, d_value = value.shape
    assert key.shape == (n_key, n_kv, d), (query.shape, key.shape, value.shape)
    assert n_key == position + n_token, (n_key, position, n_token)
    assert n_head % n_kv == 0, (n_head, n_kv)
    assert key.dtype == value.dtype, (key.dtype, value.dtype)
    assert key.dtype in (torch.float16, torch.bfloat16), key.dtype
    assert scale > 0, scale
    d_shared = 0
    if query_shared is not None and key_shared is not None:
        d_shared = key_shared.shape[1]
        assert query_shared.shape == (n_token, n_head, d_shared), (query_shared.shape, key_shared.shape)
        assert key_shared.shape == (n_key, d_shared), (key_shared.shape, key.shape)
        assert key_shared.dtype == key.dtype, (key_shared.dtype, key.dtype)
    else:
        query_shared, key_shared = query, key[:, 0]  # stand-ins that are never read
    out = query.new_empty(n_token, n_head, d_value, dtype=torch.bfloat16) if out is None else out
    assert out.shape == (n_token, n_head, d_value), (out.shape, query.shape, value.shape)
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value, query_shared, key_shared, out))
    if n_token == 0:
        return out
    blocks = [max(16, next_power_of_2(width)) for width in (d, max(1, d_shared), d_value)]
    width = max(blocks[0] + (blocks[1] if d_shared else 0), blocks[2])
    cut = tuning or (NARROW if width <= 128 else WIDE if width <= 256 else VERY_WIDE)
    rows = cut.rows if n_token > FEW_ROWS else min(cut.rows, max(16, next_power_of_2(n_token)))
    with torch.cuda.device_of(query):
        prompt_attention_kernel[n_head, cdiv(n_token, rows)](
            query,
            query_shared,
            key,
            key_shared,
            value,
            out,
            *query.stride()[:2],
            *query_shared.stride()[:2],
            *key.stride()[:2],
            key_shared.stride(0),
            *value.stride()[:2],
            *out.stride()[:2],
            scale * _LOG2_E,
            position,
            n_token,
            GROUP=n_head // n_kv,
            D=d,
            D_BLOCK=blocks[0],
            D_SHARED=d_shared,
            SHARED_BLOCK=blocks[1],
            DV=d_value,
            DV_BLOCK=blocks[2],
            ROWS=rows,
            KEYS=cut.keys,
            num_warps=cut.num_warps if rows > FEW_ROWS else min(4, cut.num_warps),
            num_stages=cut.num_stages,
        )
    return out


def grouped_prompt_attention(query: Tensor, k_cache: Cache, v_cache: Cache, scale: float, position: int) -> Tensor:
    """`prompt_attention` over caches of any type, `[capacity, n_kv_head, d]`, which hold the tokens' keys already."""
    n_token, n_head, _ = query.shape
    seen = slice(position + n_token)
    keys, values = part(k_cache, seen), part(v_cache, seen)
    n_key, n_kv, d = keys.shape if isinstance(keys, Tensor) else keys.values.shape
    out = query.new_empty(query.shape, dtype=torch.bfloat16)
    group = n_head // n_kv
    step = n_kv if is_half(keys) else heads_at_once(n_kv, 2 * n_key * d)
    for first in range(0, n_kv, step):
        heads = slice(first, first + step)
        queries = slice(first * group, (first + step) * group)
        key, value = (cached_halves(part(rows, (slice(None), heads))) for rows in (keys, values))
        prompt_attention(query[:, queries], key, value, scale, position, out=out[:, queries])
    return out


def heads_at_once(n_head: int, n_value: int) -> int:
    """Of heads with `n_value` half-precision keys and values each, as many as `EXPANDED_BYTES` hold, at least one."""
    return min(n_head, max(1, EXPANDED_BYTES // (2 * n_value)))
