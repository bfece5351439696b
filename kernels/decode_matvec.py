"""Dense matrices times few tokens, with what comes before and after them in the same launch."""

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from moe_engine.kernels import decode_tiles, reference
from moe_engine.kernels.decode_activations import RUN, Activations, quantize
from moe_engine.kernels.device import run_kernels, table
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import QuantType


def is_fast(type: QuantType) -> bool:
    """Whether the type is multiplied in 8-bit integers."""
    from moe_engine.kernels.decode_units import UNIT_SIZES

    return type.name in UNIT_SIZES


def alignment(type: QuantType, *offsets: int) -> int:
    """What all blocks' addresses are a multiple of, at most 16; 0 if the fast path cannot take them."""
    align = gcd(16, type.block_bytes, *offsets)
    if not is_fast(type):
        return 0
    return align if align % 2 == 0 or type.block_bytes % 2 == 1 else 0


def unpacking_tile(type: QuantType) -> dict[str, int]:
    """The tile that unpack.py cuts a block into; single elements are bundled."""
    from moe_engine.kernels.unpack import RUN_WIDTHS

    width = RUN_WIDTHS[type.name]
    return {"N_RUN": 128 if type.block_size == 1 else type.block_size // width, "RUN_WIDTH": width}


def units(type: QuantType, n_in: int) -> int:
    """Units in a row of n_in elements, by which 8-bit products step; one for types without them."""
    from moe_engine.kernels.decode_units import UNIT_SIZES

    return n_in // UNIT_SIZES.get(type.name, n_in)


def matvec(
    x: Tensor,
    weight: QuantTensor,
    out: Tensor | None = None,
    activations: Activations | None = None,
    *,
    residual: Tensor | None = None,
    out_activations: Activations | None = None,
) -> Tensor:
    """x W^T for few tokens, plus `residual`: f32 `[(n_batch,) n_token, n_out]`.

    x: f32, f16 or bf16 `[n_token, n_in]` with weight `[n_out, n_in]`, or `[n_batch, n_token, n_in]` with weight
    `[n_batch, n_out, n_in]`; rows contiguous. The blob may lie at any address. out: f32 of the result's shape, rows
    contiguous (for the heads of attention, say, a transposed view of `[n_token, n_batch * n_out]`).
    activations: `quantize` of x, which is then read only where there is no path for 8 bits: for some types, blobs at
    odd addresses, and where `matvec_on_tensor_cores` says that many rows times 5 to 16 tokens go there, in bf16.
    residual: f32 with the shape and strides of `out`, which it may also be.
    out_activations: gets the result in 8 bits as well, laid out as the memory of `out`, so that it serves the product
    after this one. Its number of elements is that of `out`, and n_out is a multiple of 16.
    """
    assert x.stride(-1) == 1, x.stride()
    assert x.dim() == weight.data.dim(), (x.shape, weight.shape)
    assert x.shape[-1] == weight.n_in, (x.shape, weight.shape)
    assert weight.data.stride()[-2:] == (weight.data.shape[-1], 1), weight.data.stride()
    assert x.dim() == 2 or x.shape[0] == weight.data.shape[0], (x.shape, weight.shape)
    n_token, n_out = x.shape[-2], weight.n_out
    shape = (*x.shape[:-1], n_out)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    assert out.shape == shape, (out.shape, x.shape, weight.shape)
    assert out.stride(-1) == 1, out.stride()
    assert out.dtype == torch.float32, out.dtype
    if residual is not None:
        assert residual.shape == shape, (residual.shape, shape)
        assert residual.stride() == out.stride(), (residual.stride(), out.stride())
        assert residual.dtype == torch.float32, residual.dtype
    if out.numel() == 0:
        return out
    if not run_kernels(x):
        y = reference.matvec(x, weight)
        return out.copy_(y if residual is None else y + residual)

    from moe_engine.kernels.decode_matvec_kernel import matvec_kernel
    from moe_engine.kernels.decode_overlap import overlap_options

    batched = x.dim() == 3
    n_batch = x.shape[0] if batched else 1
    data_stride = weight.data.stride(0) if batched else 0
    align = alignment(weight.type, weight.data.data_ptr(), data_stride)
    n_unit = units(weight.type, weight.n_in)
    n_row = n_out * n_batch
    tiles = decode_tiles.matvec_on_tensor_cores(n_token, n_row, weight.n_in, n_unit) if align else None
    if tiles is not None:
        tile = tiles
        x = x.to(torch.bfloat16).contiguous()
    elif align:
        activations = quantize(x) if activations is None else activations
        assert activations.codes.shape == (n_batch * n_token, weight.n_in), (activations.codes.shape, x.shape)
        tile = decode_tiles.matvec_tile(n_token, n_row, n_unit, align, out_activations is not None)
    else:
        rows = 16 if out_activations is not None else 4
        tile = decode_tiles.unpacked_tile(rows) | {"TOKENS": 1, "PREFETCH": False}
    if out_activations is not None:
        assert n_out % RUN == 0, n_out
        assert all(stride % RUN == 0 for stride in out.stride()[:-1]), out.stride()
        assert out_activations.codes.numel() == out.numel(), (out_activations.codes.shape, shape)
    with torch.cuda.device_of(x):
        matvec_kernel[-(-n_token // tile["TOKENS"]), -(-n_out // tile["ROWS"]), n_batch](
            weight.data,
            x,
            x if activations is None else activations.codes,  # stand-ins that are never used, as below
            x if activations is None else activations.pairs,
            table(weight.type.id, x.device),
            out if residual is None else residual,
            out,
            out if out_activations is None else out_activations.codes,
            out if out_activations is None else out_activations.pairs,
            n_token,
            n_out,
            data_stride,
            x.stride(0) if batched else 0,
            x.stride(-2),
            out.stride(0) if batched else 0,
            out.stride(-2),
            TYPE=weight.type.name,
            ALIGN=align,
            BLOCK_BYTES=weight.type.block_bytes,
            N_UNIT=n_unit,
            N_IN=weight.n_in,
            ROW_BYTES=weight.data.shape[-1],
            RESIDUAL=residual is not None,
            QUANTIZE=out_activations is not None,
            TILES=tiles is not None,
            enable_fp_fusion=True,
            **unpacking_tile(weight.type),
            **tile,
            **overlap_options(x.device),
        )
    return out


def matvecs(
    x: Tensor, weights: Sequence[QuantTensor], out: Tensor | None = None, activations: Activations | None = None
) -> tuple[Tensor, ...]:
    """`matvec` of x with each of up to three matrices, of any types and heights, in one launch if all are fast.

    x: `[n_token, n_in]`. out: f32 `[n_token, sum of n_out]`, rows contiguous. Returns its parts, one for each matrix.
    """
    n_token, n_in = x.shape
    heights = [weight.n_out for weight in weights]
    if out is None:
        out = torch.empty(n_token, sum(heights), dtype=torch.float32, device=x.device)
    assert out.shape == (n_token, sum(heights)), (out.shape, heights)
    assert out.dtype == torch.float32, out.dtype
    assert out.stride(1) == 1, out.stride()
    assert 1 <= len(weights) <= 3, len(weights)
    parts: tuple[Tensor, ...] = out.split(heights, dim=1)
    aligns = [alignment(weight.type, weight.data.data_ptr()) for weight in weights]
    for weight in weights:
        assert weight.n_in == n_in, (weight.shape, x.shape)
        assert weight.data.is_contiguous(), weight.data.stride()
    n_row, n_unit = sum(heights), min(units(weight.type, n_in) for weight in weights)
    tiles = decode_tiles.matvec_on_tensor_cores(n_token, n_row, n_in, n_unit)
    if not run_kernels(x) or len(weights) == 1 or not all(aligns) or tiles is not None:
        if activations is None and run_kernels(x) and any(aligns) and tiles is None:
            activations = quantize(x)
        for weight, part in zip(weights, parts, strict=True):
            matvec(x, weight, part, activations)
        return parts
    if n_token == 0:
        return parts

    from moe_engine.kernels.decode_matvec_kernel import matvecs_kernel
    from moe_engine.kernels.decode_overlap import overlap_options

    if activations is None:
        activations = quantize(x)
    assert activations.codes.shape == x.shape, (activations.codes.shape, x.shape)
    tile = decode_tiles.matvec_tile(n_token, n_row, n_unit, min(aligns))
    constants: dict[str, Any] = {}
    filled = [*zip("ABC", weights, aligns, heights, strict=False)]
    if len(weights) == 2:
        filled.append(("C", weights[1], aligns[1], 0))
    for name, weight, align, height in filled:
        constants |= {name: weight.type.name, f"{name}_ALIGN": align, f"{name}_OUT": height}
        constants |= {f"{name}_UNITS": units(weight.type, n_in), f"{name}_ROW_BYTES": weight.data.shape[-1]}
    n_block = sum(-(-height // tile["ROWS"]) for height in heights)
    with torch.cuda.device_of(x):
        matvecs_kernel[-(-n_token // tile["TOKENS"]), n_block](
            *(weight.data for _, weight, _, _ in filled),
            activations.codes,
            activations.pairs,
            out,
            n_token,
            out.stride(0),
            N_IN=n_in,
            enable_fp_fusion=True,
            **constants,
            **tile,
            **overlap_options(x.device),
        )
    return parts
