"""Quantized weights to floats on the GPU, and the simplest correct products with them.

Where there is no GPU the work goes to `reference.dequantize`, or to Triton's interpreter if TRITON_INTERPRET=1 was
set before the kernel was first used. Triton is imported only then.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from moe_engine.kernels import device, reference
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import QuantType

# Types read as words (unpack_words.py).
WORD_TYPES = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0", "IQ4_XS"}
WORD_TYPES |= {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
# Plain floats where they are aligned; torch converts f32 as fast as it copies, f16 and bf16 at half that or less.
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements a program writes with 4 warps. On an H200, to bf16: 16384 instead of 8192 took Q4_K from 84 to 82 % of the
# copy bandwidth, IQ4_XS from 84 to 72 %. With 1024, 2048, 4096 and 8192, Q8_0 had 84 83 90 91 %, MXFP4 92 92 95 94 %.
# The others are not tuned.
_TILE = 2048
_TILES = dict.fromkeys(WORD_TYPES, 8192) | dict.fromkeys(("Q8_0", "MXFP4"), 4096)
# The interpreter's time goes by operation, not by element.
_INTERPRETER_TILE = 1 << 15


def _reads_words(type: QuantType) -> bool:
    """Whether to take the faster of two ways: not in the interpreter, which is slow at many small operations."""
    return type.name in WORD_TYPES and not device.is_interpreted()


def _as_batch(data: torch.Tensor) -> torch.Tensor:
    """A view `[n_batch, n_row, row_bytes]` whose matrices are contiguous: one matrix where possible."""
    if data.is_contiguous():
        return data.view(1, -1, data.shape[-1])
    batch = data.flatten(0, -3) if data.dim() > 2 else data[None]
    assert batch.stride()[1:] == (data.shape[-1], 1), "the rows of a matrix must be contiguous"
    assert batch.data_ptr() == data.data_ptr(), "the matrices of a stack must be evenly spaced"
    return batch


def dequantize(
    weight: QuantTensor, out: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values of `weight` as floats `[..., n_out, n_in]` on the device of its data.

    The data may start at any byte of a larger buffer; the rows of a matrix follow each other without gaps.
    `out`, a contiguous tensor of that shape, is written to if given, and its dtype wins. dtype: f32 (the exact
    values of the GGUF reference), f16 or bf16 (those, rounded).
    """
    data = weight.data
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=data.device)
    with torch.cuda.device_of(data):
        expansion(weight, out)()
    return out


def expansion(weight: QuantTensor, out: torch.Tensor) -> Callable[[], object]:
    """`dequantize(weight, out)`, to be called many times, on the tensors' device."""
    data = weight.data
    assert out.shape == weight.shape, (out.shape, weight.shape)
    assert out.is_contiguous()
    assert out.device == data.device, (out.device, data.device)
    assert out.dtype in (torch.float32, torch.float16, torch.bfloat16), out.dtype
    if data.numel() == 0:
        return lambda: None
    batch = _as_batch(data)
    if not data.is_cuda and not device.is_interpreted():
        return lambda: out.copy_(reference.dequantize(weight))
    plain = _FLOATS.get(weight.type.name)
    is_fast = plain in (torch.float32, out.dtype)
    if plain is not None and is_fast and (batch.data_ptr() | batch.stride(0)) % plain.itemsize == 0:
        return partial(out.copy_, batch.view(plain).view(out.shape))
    return _launch(batch, weight.type, out)


def tile_constants(type: QuantType) -> dict[str, Any]:
    """How `dequantize_tile` takes blocks of this type."""
    from moe_engine.kernels.unpack import RUN_WIDTHS
    from moe_engine.kernels.unpack_pairs import PAIR_TYPES

    if _reads_words(type):
        n_run, width, distance = 8, 32, -1
    elif type.name in PAIR_TYPES:
        n_run, width, distance = 1, 16, 16
    else:
        width = RUN_WIDTHS[type.name]
        n_run, distance = type.block_size // width, 0
    tile = _INTERPRETER_TILE if device.is_interpreted() else _TILES.get(type.name, _TILE)
    return {
        "TYPE": type.name,
        "BLOCK_BYTES": type.block_bytes,
        "N_RUN": n_run,
        "RUN_WIDTH": width,
        "DISTANCE": distance,
        "TILE_BLOCKS": tile // type.block_size,
    }


def _launch(batch: torch.Tensor, type: QuantType, out: torch.Tensor) -> Callable[[], object]:
    from moe_engine.kernels.dequantize_kernel import dequantize_kernel
    from moe_engine.kernels.launch import prepared

    n_blocks = batch.shape[1] * batch.shape[2] // type.block_bytes
    constants = tile_constants(type)
    return prepared(
        dequantize_kernel,
        (-(-n_blocks // constants["TILE_BLOCKS"]), batch.shape[0]),
        batch,
        device.table(type.id, batch.device),
        out,
        n_blocks,
        batch.stride(0),
        ALIGN=math.gcd(batch.data_ptr(), batch.stride(0), type.block_bytes, 8),
        enable_fp_fusion=False,  # a fused multiply-add would round once where the reference rounds twice
        **constants,
    )


def embedding(weight: QuantTensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int32 or int64 `[n]`, on the weight's device) of a matrix: f32 `[n, n_in]`."""
    assert weight.data.dim() == 2, weight.data.shape
    return dequantize(QuantTensor(weight.data.index_select(0, ids), weight.type, weight.n_in))


def linear(x: torch.Tensor, weight: QuantTensor, scratch: torch.Tensor) -> torch.Tensor:
    """x W^T in f32, one slice of W's rows at a time.

    x: f32 `[n_token, n_in]` with weight `[n_out, n_in]`, or f32 `[n_batch, n_token, n_in]` with weight
    `[n_batch, n_out, n_in]`. scratch: flat f32, any contents, room for one row or more; the slices are as large
    as fit. Returns f32 `[(n_batch,) n_token, n_out]`. A matrix of a batch gives the same result as on its own.
    """
    assert x.dtype == torch.float32, x.dtype
    assert x.shape[-1] == weight.n_in, (x.shape, weight.shape)
    if x.dim() == 3:
        assert x.shape[0] == weight.data.shape[0], (x.shape, weight.shape)
        y = x.new_empty(*x.shape[:-1], weight.n_out)
        for index in range(x.shape[0]):  # a batched product might be summed differently for each batch size
            _linear_into(y[index], x[index], weight[index], scratch)
        return y
    y = x.new_empty(x.shape[0], weight.n_out)
    _linear_into(y, x, weight, scratch)
    return y


def _linear_into(y: torch.Tensor, x: torch.Tensor, weight: QuantTensor, scratch: torch.Tensor) -> None:
    assert scratch.dtype == torch.float32, scratch.dtype
    assert scratch.dim() == 1, scratch.shape
    assert scratch.is_contiguous()
    n_rows = scratch.numel() // weight.n_in
    assert n_rows > 0, f"the scratch of {scratch.numel()} elements cannot hold a row of {weight.n_in}"
    for start in range(0, weight.n_out, n_rows):
        rows = weight.rows(start, min(start + n_rows, weight.n_out))
        values = dequantize(rows, out=scratch[: rows.n_out * rows.n_in].view(rows.shape))  # [rows, n_in]
        torch.matmul(x, values.t(), out=y[:, start : start + rows.n_out])


# Rows of a slice of a matrix: the tensor cores want columns of the result that start at whole tiles.
_SLICE_ROWS = 128


class Halves:
    """Matrices, or stacks of them, in half precision, in scratch memory that others may use afterwards; for many times:
    launches are prepared.

    weights: stay where they are. scratch: flat f32, room for all of them. dtype: bf16 or f16.
    """

    def __init__(self, weights: Sequence[QuantTensor], scratch: torch.Tensor, dtype: torch.dtype) -> None:
        room, at = scratch.view(dtype), 0
        self._values: list[torch.Tensor] = []
        for weight in weights:
            n = math.prod(weight.shape)
            self._values.append(room[at : at + n].view(weight.shape))
            at += n
        self._expand = [expansion(weight, values) for weight, values in zip(weights, self._values, strict=True)]

    def __call__(self) -> list[torch.Tensor]:
        with torch.cuda.device_of(self._values[0]):
            for launch in self._expand:
                launch()
        return self._values


class _Slice(NamedTuple):
    first: int  # row
    values: torch.Tensor  # [n_in, n], in the scratch
    expand: list[Callable[[], object]]  # puts them there


class HalfProduct:
    """x [W_1; W_2; ...]^T on the tensor cores, weights as x's type, sums in f32; for many x: launches are prepared.

    weights: `[n_out, n_in]`, which stay where they are. scratch: as in `linear`; slices are as large as fit, whatever
    matrices they are of, and each overwrites the last. dtype: of x, bf16 or f16.
    """

    def __init__(
        self, weights: Sequence[QuantTensor], scratch: torch.Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        n_in = weights[0].n_in
        assert dtype in (torch.bfloat16, torch.float16), dtype
        assert all(weight.n_in == n_in for weight in weights), [weight.shape for weight in weights]
        room = scratch.view(dtype)
        n_row = room.numel() // n_in
        n_row -= n_row % _SLICE_ROWS if n_row > _SLICE_ROWS else 0
        assert n_row > 0, f"the scratch of {room.numel()} elements cannot hold a row of {n_in}"
        self.dtype, self.sizes = dtype, [weight.n_out for weight in weights]
        self._n_out, self._slices = sum(self.sizes), []
        for first in range(0, self._n_out, n_row):
            values = room[: min(n_row, self._n_out - first) * n_in].view(-1, n_in)
            self._slices.append(_Slice(first, values.t(), list(_expansions(weights, first, values))))

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> torch.Tensor:
        """x `[n_token, n_in]`, rows contiguous. out: `[n_token, n_out_1 + n_out_2 + ...]`, of x's type or f32.
        add: to what `out` (f32) holds."""
        assert x.dtype == self.dtype, x.dtype
        assert out.shape == (x.shape[0], self._n_out), (out.shape, x.shape)
        assert not add or out.dtype == torch.float32, out.dtype
        with torch.cuda.device_of(x):
            for first, values, expand in self._slices:
                for launch in expand:
                    launch()
                columns = out if len(self._slices) == 1 else out[:, first : first + values.shape[1]]
                if out.dtype == x.dtype:
                    torch.mm(x, values, out=columns)
                elif x.is_cuda:
                    torch.addmm(columns, x, values, out_dtype=torch.float32, beta=int(add), out=columns)
                else:  # PyTorch has products of two types on GPUs only
                    torch.addmm(columns, x.float(), values.float(), beta=int(add), out=columns)
        return out


def _expansions(weights: Sequence[QuantTensor], first: int, values: torch.Tensor) -> Iterator[Callable[[], object]]:
    """What writes rows `first` and on, of matrices one below the other, to `values` `[n, n_in]`."""
    above, last = 0, first + len(values)
    for weight in weights:
        start, stop = max(first, above), min(last, above + weight.n_out)
        if start < stop:
            yield expansion(weight.rows(start - above, stop - above), values[start - first : stop - first])
        above += weight.n_out
