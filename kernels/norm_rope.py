"""RMSNorm, and what happens between the projections and attention: q/k norm, rotation, the write to the KV cache.

Positions are read from a device tensor, so that a CUDA graph can be replayed at any. Outside the cache nothing is
written. Sources: Zhang and Sennrich 2019 (RMSNorm); Su et al. 2021 (rotary embedding); ggml (Q8_0).
"""

import torch
from torch import Tensor

from moe_engine.kernels.decode_activations import RUN, Activations
from moe_engine.kernels.decode_overlap import overlap_options
from moe_engine.kernels.device import next_power_of_2
from moe_engine.kernels.norm_rope_cache import FLOATS, Cache, Q8Cache, cached_floats, planes, quantize_reference
from moe_engine.kernels.norm_rope_kernel import latent_kernel, qk_kernel, rms_norm_kernel

__all__ = ["Cache", "Q8Cache", "cached_floats", "fused_rms_norm", "latent_norm_rope_append", "planes"]
__all__ += ["qk_norm_rope_append", "quantize_reference", "rms_norm_reference", "rope_reference"]


def fused_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    activations: Activations | None = None,
) -> Tensor:
    """Rows of x over their root mean square, times weight; sums are f32.

    x: f32, f16 or bf16 `[n_token, n]`, rows contiguous. weight: f32 `[n]`. out: `[n_token, n]`, contiguous, default
    f32. activations: gets the normed rows in 8 bits as well, `[n_token, n]` with n a multiple of 16, for the products
    that follow. What is added to x is added by the product before (`matvec`, `moe_decode`).
    """
    n_token, n = x.shape
    assert x.stride(1) == 1, x.stride()
    assert x.dtype in FLOATS, x.dtype
    _checked(weight, (n,), torch.float32)
    out = x.new_empty(n_token, n, dtype=torch.float32) if out is None else _checked(out, (n_token, n))
    if activations is not None:
        assert n % RUN == 0, n
        assert activations.codes.shape == (n_token, n), (activations.codes.shape, x.shape)
    if n_token == 0:
        return out
    block = next_power_of_2(n)
    with torch.cuda.device_of(x):
        rms_norm_kernel[n_token,](
            x,
            weight,
            out,
            out if activations is None else activations.codes,  # stand-ins that are never used
            out if activations is None else activations.pairs,
            n,
            x.stride(0),
            eps,
            QUANTIZE=activations is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),  # not tuned, as below
            **overlap_options(x.device),
        )
    return out


def qk_norm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Adds biases, norms the heads of q and k, rotates them; k and v go into the caches. Returns q. One launch.

    q: `[n_token, n_head, d]`, k and v: `[n_token, n_kv_head, d]`, f32, f16 or bf16; tokens may be strided (views of
    one fused projection). cos, sin: f32 `[n_position, n_rot / 2]`, at least as many positions as the caches hold.
    positions: int32, one per token, or one per sequence (a scalar for one): the position of its first token. norms:
    f32 `[d]` for q and k. bias: f32 `[(n_head + 2 n_kv_head) d]`, q's first. out: contiguous, default f32; must not
    overlap q.
    """
    n_token, n_head, d = q.shape
    n_kv = k.shape[1]
    assert k.shape == v.shape == (n_token, n_kv, d), (q.shape, k.shape, v.shape)
    for part in (q, k, v):
        assert part.dtype in FLOATS, part.dtype
        assert part.stride()[1:] == (d, 1) or part.shape[1] == part.stride(2) == 1, part.stride()
    (k_values, k_scales), (v_values, v_scales) = planes(k_cache), planes(v_cache)
    assert k_values.shape == v_values.shape, (k_values.shape, v_values.shape)
    assert k_values.shape[-2:] == (n_kv, d), k_values.shape
    assert isinstance(k_cache, Q8Cache) == isinstance(v_cache, Q8Cache)
    capacity = k_values.shape[-3]
    per_sequence, per_position = _tokens_per(n_token, k_values.shape[:-3], positions)
    n_rot = _rotated(cos, sin, capacity, d)
    if norms is not None:
        for norm in norms:
            _checked(norm, (d,), torch.float32)
    if bias is not None:
        _checked(bias, ((n_head + 2 * n_kv) * d,), torch.float32)
    out = q.new_empty(q.shape, dtype=torch.float32) if out is None else _checked(out, tuple(q.shape))
    if n_token == 0:
        return out
    q_norm, k_norm = norms or (cos, cos)  # stand-ins that are never read, as for the bias
    with torch.cuda.device_of(q):
        qk_kernel[n_head + 2 * n_kv, n_token](
            q,
            k,
            v,
            out,
            k_values,
            k_scales,
            v_values,
            v_scales,
            cos if bias is None else bias,
            q_norm,
            k_norm,
            cos,
            sin,
            positions,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            capacity,
            eps,
            N_HEAD=n_head,
            N_KV=n_kv,
            D=d,
            BLOCK=max(32, next_power_of_2(d)),
            N_NORM=0 if norms is None else d,
            N_ROT=n_rot,
            INTERLEAVED=interleaved,
            HAS_BIAS=bias is not None,
            QUANTIZED=isinstance(k_cache, Q8Cache),
            TOKENS=per_sequence,
            PER_POSITION=per_position,
            num_warps=1,
            **overlap_options(q.device),
        )
    return out


def latent_norm_rope_append(
    q_pe: Tensor,
    kv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Cache,
    *,
    eps: float,
    out: Tensor,
    q_nope: Tensor | None = None,
    activations: Activations | None = None,
) -> Tensor:
    """MLA: rotates queries (interleaved) into `out`; the normed latent and the rotated key go into the cache.

    q_pe: `[n_token, n_head, n_rot]`, any strides but the last. kv: `[n_token, kv_lora + n_rot]`. weight: f32
    `[kv_lora]`, the latent's norm. cos, sin, positions: as in `qk_norm_rope_append`. cache: `[(n_sequence,)
    capacity, kv_lora + n_rot]`. out: like q_pe, say the end of the rows that `decode_attention` takes. One launch.
    q_nope: `[n_token, n_head, n_nope]`, the queries' other part, n_nope a multiple of 16: activations gets it in 8
    bits, `[n_head * n_token, n_nope]`, for the product with the keys' matrices, `matvec(q_nope.transpose(0, 1), k_b)`.
    """
    n_token, n_head, n_rot = q_pe.shape
    kv_lora = weight.shape[0]
    assert q_pe.dtype in FLOATS, q_pe.dtype
    assert kv.dtype in FLOATS, kv.dtype
    assert kv.shape == (n_token, kv_lora + n_rot), (kv.shape, kv_lora, n_rot)
    assert out.shape == q_pe.shape, (out.shape, q_pe.shape)
    assert q_pe.stride(2) == kv.stride(1) == out.stride(2) == 1
    _checked(weight, (kv_lora,), torch.float32)
    values, scales = planes(cache)
    assert values.shape[-1] == kv_lora + n_rot, values.shape
    capacity = values.shape[-2]
    per_sequence, per_position = _tokens_per(n_token, values.shape[:-2], positions)
    assert _rotated(cos, sin, capacity, n_rot) == n_rot, (cos.shape, n_rot)
    n_nope = 0
    if q_nope is not None:
        assert activations is not None
        n_nope = q_nope.shape[2]
        assert q_nope.shape == (n_token, n_head, n_nope), (q_nope.shape, q_pe.shape)
        assert q_nope.stride(2) == 1, q_nope.stride()
        assert n_nope % RUN == 0, n_nope
        assert activations.codes.shape == (n_head * n_token, n_nope), (activations.codes.shape, q_nope.shape)
    if n_token == 0:
        return out
    with torch.cuda.device_of(q_pe):
        latent_kernel[n_head + 1, n_token](
            q_pe,
            kv,
            kv if q_nope is None else q_nope,  # stand-ins that are never used
            out,
            out if activations is None else activations.codes,
            out if activations is None else activations.pairs,
            values,
            scales,
            weight,
            cos,
            sin,
            positions,
            q_pe.stride(0),
            q_pe.stride(1),
            out.stride(0),
            out.stride(1),
            kv.stride(0),
            0 if q_nope is None else q_nope.stride(0),
            0 if q_nope is None else q_nope.stride(1),
            capacity,
            eps,
            N_HEAD=n_head,
            KV_LORA=kv_lora,
            N_ROT=n_rot,
            N_NOPE=n_nope,
            NOPE_BLOCK=max(16, next_power_of_2(n_nope)),
            Q_BLOCK=next_power_of_2(n_rot),
            KV_BLOCK=max(32, next_power_of_2(kv_lora + n_rot)),
            QUANTIZED=isinstance(cache, Q8Cache),
            TOKENS=per_sequence,
            PER_POSITION=per_position,
            num_warps=2,
            **overlap_options(q_pe.device),
        )
    return out


def _tokens_per(n_token: int, sequences: tuple[int, ...], positions: Tensor) -> tuple[int, int]:
    """How many tokens share a sequence and an element of `positions`."""
    assert positions.dtype == torch.int32, positions.dtype
    assert positions.is_contiguous()
    n_sequence = sequences[0] if sequences else 1
    assert n_token % n_sequence == 0, (n_token, n_sequence)
    per_sequence = max(1, n_token // n_sequence)
    if positions.numel() == n_token:
        return per_sequence, 1
    assert positions.numel() == n_sequence, (positions.shape, n_token, n_sequence)
    return per_sequence, per_sequence


def _rotated(cos: Tensor, sin: Tensor, capacity: int, d: int) -> int:
    """Rotated values of a head, from tables that must cover the cache."""
    n_position, half = cos.shape
    assert n_position >= capacity, f"cosines for {n_position} positions, a cache of {capacity}"
    assert 2 * half <= d, (cos.shape, d)
    for table in (cos, sin):
        _checked(table, (n_position, half), torch.float32)
    return 2 * half


def _checked(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.dtype == dtype if dtype is not None else tensor.dtype in FLOATS, tensor.dtype
    assert tensor.is_contiguous()
    return tensor


# -- plain references ----------------------------------------------------------------------------------------------


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """f32 from floats `[..., n]`."""
    y: Tensor = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps) * weight
    return y


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """`x` f32 `[n_token, n_head, d]` rotated at `positions` `[n_token]`; what the tables do not cover passes."""
    half = cos.shape[1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.split(half, dim=-1)
    c, s = cos[positions.long(), None], sin[positions.long(), None]  # [n_token, 1, half]
    pair = (a * c - b * s, b * c + a * s)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([rotated, rest], dim=-1)
