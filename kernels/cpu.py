"""Matrix products and expert networks on the CPU, straight from quantized weights.

The typed face of the compiled library `_cpu` (sources in `csrc/`, contract in `csrc/moe_cpu.h`): shapes are
checked here once, then only addresses cross over.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from moe_engine.errors import ConfigError, NativeLibraryError
from moe_engine.kernels.codebooks import codebook
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME

try:
    from moe_engine.kernels import _cpu
except ImportError as error:
    raise NativeLibraryError(
        f"the compiled CPU kernels cannot be loaded ({error}): install the package with "
        "`pip install .` (or `pip install -e .` inside a checkout), which builds them and needs a C++17 compiler"
    ) from error

_CODEBOOKS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")


@cache
def _prepare() -> None:
    """Choose the instruction set and hand the IQ grids to the library; once per process."""
    try:
        _cpu.tier()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for name in _CODEBOOKS:
        grid = codebook(BY_NAME[name].id)
        _cpu.set_codebook(BY_NAME[name].id, grid.ctypes.data, grid.nbytes)


def available_tiers() -> list[str]:
    """Instruction sets that this processor can run, lowest first.

    Of "scalar", "avx2", "avx512", "avx512vnni", "avx512vbmi" (with VNNI and GFNI) and "amx".
    """
    return _cpu.available_tiers()


def host_buffer(n_bytes: int) -> torch.Tensor:
    """Uninitialized memory for expert weights, uint8 `[n_bytes]`, freed with the tensor.

    In huge pages where the system gives them (the kernels read hundreds of megabytes per token: fewer page
    translations), and spread over all memory nodes. Raises MemoryError if the system refuses.
    """
    return _cpu.host_buffer(n_bytes)


@dataclass(frozen=True)
class ExpertHandle:
    """The experts of one layer, registered with the library; keeps their weights alive."""

    gate: QuantTensor
    up: QuantTensor
    down: QuantTensor
    layer: _cpu.ExpertLayer

    @property
    def n_expert(self) -> int:
        return self.gate.shape[0]

    @property
    def hidden(self) -> int:
        return self.gate.n_in


class CpuKernels:
    """Kernels bound to a pool of `threads` threads (the calling one included).

    With `float_activations` the products are exact up to float32 rounding; without, activations are rounded
    to 8 bits in blocks of 32, which costs about 0.5 % relative error and is several times faster. Calls from
    several Python threads are safe and run one after the other.

    Idle threads spin for `spin_microseconds`, then sleep; both are milder where other threads want the
    processors. With `pin` each thread but the calling one stays on a processor of its own.

    Raises ConfigError for an impossible number or a malformed MOE_ENGINE_CPU_TIER.
    """

    def __init__(
        self, threads: int, float_activations: bool = False, *, spin_microseconds: int = 100, pin: bool = True
    ) -> None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        if not 0 <= spin_microseconds <= 1_000_000:
            raise ConfigError(f"spin_microseconds must be from 0 to 1000000, not {spin_microseconds}")
        _prepare()
        self.threads = threads
        self.float_activations = float_activations
        self.pool = _cpu.ThreadPool(threads, spin_microseconds, pin)
        self._background: _cpu.BackgroundFfn | None = None
        self._background_uses: tuple[object, ...] = ()

    @property
    def tier(self) -> str:
        """The instruction set in use; the environment variable MOE_ENGINE_CPU_TIER can lower it."""
        return _cpu.tier()

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        """`x W^T`, float32 `[..., n_tokens, n_out]`.

        A matrix `[n_out, n_in]` takes x `[..., n_tokens, n_in]`; a stack `[n_batch, n_out, n_in]` takes x
        `[n_batch, n_tokens, n_in]` and multiplies matrix by matrix.
        """
        assert x.shape[-1] == weight.n_in, (x.shape, weight.shape)
        data = _checked(weight)
        if data.dim() == 3:
            n_batch, n_tokens = data.shape[0], x.shape[-2]
            assert x.dim() == 3, (x.shape, weight.shape)
            assert x.shape[0] == n_batch, (x.shape, weight.shape)
        else:
            n_batch, n_tokens = 1, x.numel() // weight.n_in
        x = _float_rows(x)
        y = torch.empty((*x.shape[:-1], weight.n_out), dtype=torch.float32)
        batch_stride = data.stride(0) if data.dim() == 3 else 0
        _cpu.matmul(
            self.pool,
            weight.type.id,
            data.data_ptr(),
            batch_stride,
            data.stride(-2),
            n_batch,
            weight.n_out,
            weight.n_in,
            x.data_ptr(),
            n_tokens,
            y.data_ptr(),
            self.float_activations,
        )
        return y

    def dequantize(self, weight: QuantTensor) -> torch.Tensor:
        """The decoded weights, float32 of shape `weight.shape`, bit for bit as the format defines them."""
        data = _checked(weight)
        out = torch.empty(weight.shape, dtype=torch.float32)
        for matrix, target in zip(data, out, strict=True) if data.dim() == 3 else [(data, out)]:
            self._dequantize_rows(weight, matrix, target)
        return out

    def gather(self, weight: QuantTensor, row_ids: torch.Tensor) -> torch.Tensor:
        """Rows `row_ids` (int `[n]`) of a matrix, decoded: float32 `[n, n_in]`.

        Raises IndexError for an id outside the matrix.
        """
        data = _checked(weight)
        assert data.dim() == 2, weight.shape
        out = torch.empty((row_ids.numel(), weight.n_in), dtype=torch.float32)
        if row_ids.numel() > 0:
            self._dequantize_rows(weight, data.index_select(0, row_ids.reshape(-1)), out)
        return out

    def _dequantize_rows(self, weight: QuantTensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
        n_rows, stride = matrix.shape[0], matrix.stride(0)
        _cpu.dequantize(self.pool, weight.type.id, matrix.data_ptr(), n_rows, weight.n_in, stride, out.data_ptr())

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes, uint8 `[n]`, with all threads."""
        assert target.shape == source.shape, (target.shape, source.shape)
        assert target.is_contiguous(), target.stride()
        assert source.is_contiguous(), source.stride()
        _cpu.copy_memory(self.pool, target.data_ptr(), source.data_ptr(), source.numel())

    def read_rate(self, memory: torch.Tensor) -> float:
        """Bytes per second at which all threads read `memory` (uint8, contiguous), once."""
        best = 0.0
        for prefetch in (0, 2048, 4096):  # bytes ahead; which is best differs between machines
            start = time.perf_counter()
            _cpu.read_memory(self.pool, memory.data_ptr(), memory.numel(), prefetch)
            best = max(best, memory.numel() / (time.perf_counter() - start))
        return best

    def register_experts(self, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> ExpertHandle:
        """Prepare a layer's experts for `expert_ffn`.

        gate and up `[n_expert, n_ff, hidden]`, down `[n_expert, hidden, n_ff]`, each of its own type. Experts may
        lie any distance apart (gate and up may be halves of one tensor); the rows of one expert must touch.
        """
        n_expert, n_ff, hidden = gate.shape
        assert up.shape == gate.shape, (gate.shape, up.shape)
        assert down.shape == (n_expert, hidden, n_ff), (gate.shape, down.shape)
        layer = _cpu.ExpertLayer(*_stack(gate), *_stack(up), *_stack(down), n_expert, hidden, n_ff)
        return ExpertHandle(gate, up, down, layer)

    def expert_ffn(
        self,
        handle: ExpertHandle,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over a token's experts of weight * down(silu(gate x) * up x), float32 `[T, hidden]`.

        x float32 `[T, hidden]`; expert_ids int `[T, k]`, where -1 skips the place; weights float32 `[T, k]`. The sums
        are written to `out`, contiguous, if given.
        """
        n_tokens, top_k = expert_ids.shape
        assert x.shape == (n_tokens, handle.hidden), (x.shape, expert_ids.shape, handle.hidden)
        assert weights.shape == expert_ids.shape, (weights.shape, expert_ids.shape)
        x = _float_rows(x)
        expert_ids = expert_ids.to(torch.int64).contiguous()
        weights = weights.to(torch.float32).contiguous()
        if out is None:
            out = torch.empty_like(x)
        assert out.shape == x.shape, (out.shape, x.shape)
        assert out.dtype == torch.float32, out.dtype
        assert out.is_contiguous()
        in_range = _cpu.expert_ffn(
            self.pool,
            handle.layer,
            x.data_ptr(),
            n_tokens,
            expert_ids.data_ptr(),
            top_k,
            weights.data_ptr(),
            out.data_ptr(),
            self.float_activations,
        )
        assert in_range, _wrong_id(expert_ids, handle.n_expert)
        return out

    def begin_expert_ffn(
        self,
        handle: ExpertHandle,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        only: Sequence[int],
        out: torch.Tensor,
    ) -> None:
        """Begins `expert_ffn` with the experts in `only`, ascending, on a thread of its own; ids are int32.

        Nothing of it may be touched until `finish_expert_ffn`. Waits for the call that was begun before.
        """
        n_tokens, top_k = expert_ids.shape
        assert x.shape == out.shape == (n_tokens, handle.hidden), (x.shape, out.shape, expert_ids.shape)
        assert weights.shape == expert_ids.shape, (weights.shape, expert_ids.shape)
        assert expert_ids.dtype == torch.int32, expert_ids.dtype
        for tensor in (x, weights, out):
            assert tensor.dtype == torch.float32, tensor.dtype
        assert all(tensor.is_contiguous() for tensor in (x, expert_ids, weights, out))
        assert all(0 <= expert < handle.n_expert for expert in only), only
        if self._background is None:
            self._background = _cpu.BackgroundFfn(self.pool)
        places = (x.data_ptr(), n_tokens, expert_ids.data_ptr(), top_k, weights.data_ptr())
        self._background.begin(handle.layer, *places, only, out.data_ptr(), self.float_activations)
        self._background_uses = (handle, x, expert_ids, weights, out)

    def finish_expert_ffn(self) -> float:
        """Waits for the end of what was begun, if anything was: seconds since then."""
        seconds = 0.0 if self._background is None else self._background.finish()
        self._background_uses = ()
        return seconds


def _wrong_id(expert_ids: torch.Tensor, n_expert: int) -> str:
    wrong = expert_ids[(expert_ids < -1) | (expert_ids >= n_expert)]
    return f"expert id {int(wrong[0])} of {n_expert} experts"


def _float_rows(x: torch.Tensor) -> torch.Tensor:
    assert x.device.type == "cpu", x.device
    assert x.dtype == torch.float32, x.dtype
    return x.contiguous()


def _checked(weight: QuantTensor) -> torch.Tensor:
    """The bytes of a matrix or a stack of them, in CPU memory, each row without gaps."""
    data = weight.data
    assert data.device.type == "cpu", data.device
    assert data.dim() in (2, 3), data.shape
    assert data.stride(-1) == 1 or data.shape[-1] == 1, data.stride()
    return data


def _stack(weight: QuantTensor) -> tuple[int, int, int]:
    """Address, type id and distance between experts of a stack whose matrices have no gaps between rows."""
    data = _checked(weight)
    assert data.stride(1) == data.shape[2], (data.shape, data.stride())
    return data.data_ptr(), weight.type.id, data.stride(0)
