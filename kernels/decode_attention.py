"""Attention of a few new tokens over the KV cache: grouped queries, or MLA in its latent form.

The keys are cut into tiles; a fixed grid of splits (so that a CUDA graph fits every position up to the capacity) takes
them in turn, each with an online softmax; a second launch combines the splits. The query heads that share a key head,
times the tokens, are the rows of the matrix products. `attention.attention` is the definition of correct.

Products are f16 or bf16 with f32 sums, as the cache is (Q8_0: f16); of an f32 cache f32 ("ieee"). For bf16 caches
queries and probabilities are split into two bf16, high and low part, as eight bits would cost accuracy.
Sources: Dao et al. 2023 (Flash-Decoding); DeepSeek-V2 report (MLA, absorbed form).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.decode_activations import RUN, Activations
from moe_engine.kernels.decode_attention_kernel import combine_kernel, split_kernel
from moe_engine.kernels.decode_overlap import overlap_options
from moe_engine.kernels.device import cdiv, next_power_of_2
from moe_engine.kernels.norm_rope import Cache, Q8Cache, planes

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tuning:
    """How the work is cut. `n_program`: programs to aim for at full context."""

    max_rows: int
    tile_keys: int
    n_program: int
    num_warps: int
    num_stages: int


# Measured on an H200 (torch 2.11, Triton 3.6), one token, us at contexts 512 / 4096 / 32768, combination included, when
# launches did not overlap yet (the first is 4.6 / 7.0 / 21.4 since).
# Qwen3-30B-A3B, 64 keys: f16 5.8 / 8.3 / 22.5, Q8_0 6.4 / 8.1 / 23.2; 32 keys: f16 5.6 / 8.5 / 23.3, Q8_0 6.2 / 9.2 /
# 34.9; two stages: 26 at 32768. Rows and programs: not tuned.
GROUPED = Tuning(max_rows=32, tile_keys=64, n_program=264, num_warps=4, num_stages=3)
# DeepSeek-V2-Lite, f16, 32 keys: 7.8 / 9.6 / 21.1; 16 keys, two stages: 7.0 / 11.3 / 28.8; 64 keys, 8 warps, 128
# programs: 8.6 / 9.5 / 19.7. V3's 128 heads in blocks of 64 rows: slower up to 4096, at 32768 70 for 85.
LATENT = Tuning(max_rows=16, tile_keys=32, n_program=256, num_warps=4, num_stages=3)
# Elements and splits a program combines at a time: for Qwen3 at 4096, (128, 16) costs 5.7 us more; warps do not matter.
_COMBINED_WIDTH, _COMBINED_SPLITS, _COMBINED_WARPS = 32, 128, 2


def decode_attention(
    query: Tensor,
    k_cache: Cache,
    v_cache: Cache | None,
    positions: Tensor,
    scale: float,
    *,
    d_value: int | None = None,
    out: Tensor | None = None,
    tuning: Tuning | None = None,
    activations: Activations | None = None,
) -> Tensor:
    """Causal attention of the tokens at a position and after it; their keys are in the cache already.

    query: f32 `[n_token, n_head, d]` with caches `[capacity, n_kv_head, d]`, or `[n_sequence, n_token, n_head, d]`
    with `[n_sequence, capacity, n_kv_head, d]`. positions: int32, one element per sequence: its first token's.
    v_cache None (MLA): caches have no dimension for heads, the values are the first `d_value` (a power of two) of
    each key. Query head h reads key head `h // (n_head / n_kv_head)`. out: f32 `[..., n_head, d_value]`.
    A position below zero sees nothing, and its result is 0.
    activations: gets the result in 8 bits as well, d_value a multiple of 16: for the output matrix as
    `[tokens, n_head * d_value]`, or for a stack of one matrix per head as `[n_head * tokens, d_value]`.
    """
    k_values, k_scales = planes(k_cache)
    v_values, v_scales = planes(v_cache if v_cache is not None else k_cache)
    latent = v_cache is None
    if latent:
        k_values = k_values.unsqueeze(-2)
    else:
        assert v_values.shape == k_values.shape, (k_values.shape, v_values.shape)
        assert isinstance(v_cache, Q8Cache) == isinstance(k_cache, Q8Cache)
    *sequences, capacity, n_kv, d = k_values.shape
    *leading, n_token, n_head, _ = query.shape
    d_value = d if d_value is None else d_value
    assert leading == sequences, (query.shape, k_values.shape)
    assert query.shape[-1] == d, (query.shape, k_values.shape)
    assert query.dtype == torch.float32, query.dtype
    assert query.is_contiguous()
    assert n_head % n_kv == 0, (n_head, n_kv)
    n_sequence = sequences[0] if sequences else 1
    assert positions.dtype == torch.int32, positions.dtype
    assert positions.numel() == n_sequence, (positions.shape, n_sequence)
    least = 32 if isinstance(k_cache, Q8Cache) else 16
    d1 = d_value if latent else max(least, 1 << (d.bit_length() - 1))  # head dimensions in two powers of two
    d2 = max(least, next_power_of_2(d - d1)) if d > d1 else 0
    if latent:
        assert d_value in (1 << i for i in range(5, 11)), d_value
    else:
        assert d_value == d, (d_value, d)
    shape = (*query.shape[:-1], d_value)
    out = query.new_empty(shape) if out is None else out
    assert out.shape == shape, (out.shape, shape)
    assert out.is_contiguous()
    assert out.dtype == torch.float32, out.dtype
    by_head = False
    if activations is not None:
        n_tokens = n_sequence * n_token
        assert d_value % RUN == 0, d_value
        by_head = activations.codes.shape == (n_head * n_tokens, d_value)
        assert by_head or activations.codes.shape == (n_tokens, n_head * d_value), activations.codes.shape
    cut = tuning or (LATENT if latent else GROUPED)
    n_split = _splits(cut, n_sequence, n_token, n_head, n_kv, capacity)
    n_row = n_sequence * n_token * n_head
    if n_row == 0:
        return out
    parts = query.new_empty(n_row * n_split * (d_value + 2))
    sums, maxima, totals = parts.split([n_row * n_split * d_value, n_row * n_split, n_row * n_split])
    rows, row_blocks = _row_blocks(cut, n_token, n_head, n_kv)
    # Shared memory bounds the stages of a wide or an f32 cache
    n_stage = 1 if k_values.dtype == torch.float32 else cut.num_stages if latent or d <= 128 else min(2, cut.num_stages)
    dtypes = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
    with torch.cuda.device_of(query):
        split_kernel[n_split, n_kv, n_sequence * row_blocks](
            query,
            k_values,
            k_scales,
            v_values,
            v_scales,
            positions,
            sums,
            maxima,
            totals,
            scale * _LOG2_E,
            capacity,
            n_token,
            n_split,
            GROUP=n_head // n_kv,
            N_KV=n_kv,
            D=d,
            D1=d1,
            D2=d2,
            DV=d_value,
            DV2=0 if latent else d2,
            LATENT=latent,
            QUANTIZED=isinstance(k_cache, Q8Cache),
            DTYPE=dtypes.get(k_values.dtype, tl.float16),
            SPLIT=k_values.dtype == torch.bfloat16,
            UPCAST=k_values.dtype == torch.bfloat16 and not isinstance(split_kernel, triton.JITFunction),
            ROW_BLOCKS=row_blocks,
            ROWS=rows,
            KEYS=cut.tile_keys,
            num_warps=cut.num_warps,
            num_stages=n_stage,
            **overlap_options(query.device),
        )
        width = min(_COMBINED_WIDTH, next_power_of_2(d_value))
        combine_kernel[cdiv(d_value, width), n_row](
            sums,
            maxima,
            totals,
            positions,
            out,
            out if activations is None else activations.codes,  # stand-ins that are never used
            out if activations is None else activations.pairs,
            capacity,
            n_token,
            n_split,
            N_HEAD=n_head,
            DV=d_value,
            KEYS=cut.tile_keys,
            SPLITS=_COMBINED_SPLITS,
            WIDTH=width,
            QUANTIZE=activations is not None,
            BY_HEAD=by_head,
            num_warps=_COMBINED_WARPS,
            **overlap_options(query.device),
        )
    return out


def _row_blocks(cut: Tuning, n_token: int, n_head: int, n_kv: int) -> tuple[int, int]:
    """Rows of a product (at least the 16 of a tensor core), and how many such blocks a key head has."""
    n_row = n_token * (n_head // n_kv)
    rows = min(cut.max_rows, max(16, next_power_of_2(n_row)))
    return rows, -(-n_row // rows)


def _splits(cut: Tuning, n_sequence: int, n_token: int, n_head: int, n_kv: int, capacity: int) -> int:
    others = n_sequence * n_kv * _row_blocks(cut, n_token, n_head, n_kv)[1]
    return max(1, min(-(-capacity // cut.tile_keys), cut.n_program // others))
