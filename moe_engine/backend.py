"""Where the dense part of a model computes: on the CPU, or on an accelerator (CUDA, or a simulated one).

A backend turns the quantized tensors of the file into callables; the model never asks which backend it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe_engine.errors import ConfigError
from moe_engine.kernels import dequantize as device_kernels
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kernels.decode_activations import RUN
from moe_engine.kernels.decode_product import DECODE_TOKENS, Activations, matvec
from moe_engine.kernels.dequantize import HalfProduct, Halves
from moe_engine.kernels.device import run_kernels
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.slot_layout import SlotLayout

Linear = Callable[[Tensor], Tensor]
"""`x` f32 `[n_token, n_in]` to `[n_token, n_out]`, or batched `[n, n_token, n_in]` to `[n, n_token, n_out]`."""

Embedding = Callable[[Tensor], Tensor]
"""Token ids int64 `[n_token]` to rows f32 `[n_token, hidden]`."""


class Backend(Protocol):
    device: torch.device
    fused: bool  # whether attention and feed-forward run as fused kernels, on rounded activations

    def linear(self, weight: QuantTensor) -> Linear: ...

    def feed_forward(self, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> "FeedForwardWeights": ...

    def embedding(self, weight: QuantTensor) -> Embedding: ...

    def dequantize(self, weight: QuantTensor) -> Tensor:
        """All elements as f32 on the backend's device."""
        ...


@dataclass(frozen=True)
class FeedForwardWeights:
    """The three matrices of a dense feed-forward. packed: where they lie together, for `moe_decode` (slot 0)."""

    gate: Linear
    up: Linear
    down: Linear
    packed: tuple[SlotLayout, Tensor] | None = None


class CpuBackend:
    """Multiplies straight from the mapped file with the native kernels."""

    def __init__(self, cpu: CpuKernels) -> None:
        self.device, self.fused = torch.device("cpu"), False
        self.cpu = cpu

    def linear(self, weight: QuantTensor) -> Linear:
        return lambda x: self.cpu.linear(x, weight)

    def feed_forward(self, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> FeedForwardWeights:
        return FeedForwardWeights(self.linear(gate), self.linear(up), self.linear(down))

    def embedding(self, weight: QuantTensor) -> Embedding:
        return lambda ids: self.cpu.gather(weight, ids)

    def dequantize(self, weight: QuantTensor) -> Tensor:
        return self.cpu.dequantize(weight)


class AcceleratorBackend:
    """Keeps the quantized bytes in VRAM.

    Products dequantize row chunks into one scratch buffer and are exact to f32. With `int8_activations`, those of few
    tokens read the quantized weights directly and round activations to 8 bits; those of many round weights and
    activations to bf16.
    """

    def __init__(self, device: torch.device, scratch_elements: int, int8_activations: bool) -> None:
        self.device, self.int8_activations = device, int8_activations
        self.scratch = torch.empty(scratch_elements, dtype=torch.float32, device=device)
        self.fused = int8_activations and run_kernels(self.scratch)

    def linear(self, weight: QuantTensor) -> "DeviceLinear":
        return DeviceLinear(weight.to(self.device), self.scratch, self.int8_activations)

    def feed_forward(self, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> FeedForwardWeights:
        layout, pool = SlotLayout.pack(*(weight.to(self.device) for weight in (gate, up, down)))
        gate, up, down = layout.parts(pool[0])
        return FeedForwardWeights(self.linear(gate), self.linear(up), self.linear(down), (layout, pool))

    def embedding(self, weight: QuantTensor) -> Embedding:
        resident = weight.to(self.device)
        return lambda ids: device_kernels.embedding(resident, ids)

    def dequantize(self, weight: QuantTensor) -> Tensor:
        return device_kernels.dequantize(weight.to(self.device))


@dataclass(frozen=True, eq=False)
class DeviceLinear:
    """A product with a matrix, or a stack of them, in VRAM."""

    weight: QuantTensor
    scratch: Tensor
    int8_activations: bool
    _beside: dict[tuple["DeviceLinear", ...], HalfProduct] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        if self.int8_activations and x.shape[-2] <= DECODE_TOKENS:
            return matvec(x.contiguous(), self.weight)
        if self.int8_activations and x.dim() == 2 and run_kernels(x):
            out = x.new_empty(x.shape[0], self.weight.n_out)
            return self.half()(x.bfloat16(), out)
        return device_kernels.linear(x, self.weight, self.scratch)

    def half(self, *others: "DeviceLinear") -> HalfProduct:
        """For many tokens in bf16, with other matrices of the model side by side. Prepared once."""
        if others not in self._beside:
            weights = [self.weight, *(other.weight for other in others)]
            self._beside[others] = HalfProduct(weights, self.scratch)
        return self._beside[others]


def prompt_products(x: Tensor, *linears: Linear) -> list[Tensor]:
    """Products of many tokens, bf16 `[n_token, n_in]`, with matrices of an `AcceleratorBackend`: bf16, side by side."""
    first, *others = map(_on_device, linears)
    product = first.half(*others)
    out = product(x, x.new_empty(x.shape[0], sum(product.sizes)))
    return list(out.split_with_sizes(product.sizes, dim=1))


def add_prompt_product(residual: Tensor, x: Tensor, linear: Linear) -> None:
    """Adds the product of x, bf16 `[n_token, n_in]`, to the residual f32 `[n_token, n_out]`."""
    _on_device(linear).half()(x, residual, add=True)


def prepared_halves(linears: Sequence[Linear], matrices: slice, dtype: torch.dtype) -> Halves:
    """Some matrices of stacks of an `AcceleratorBackend`, to be written out again and again."""
    stacks = [_on_device(linear) for linear in linears]
    return Halves([stack.weight[matrices] for stack in stacks], stacks[0].scratch, dtype)


def scratch_values(linear: Linear) -> int:
    """In half precision, that `prepared_halves` has room for."""
    return 2 * _on_device(linear).scratch.numel()


def decode_weight(linear: Linear) -> QuantTensor:
    """The matrix of a model's product on an `AcceleratorBackend`, for kernels that take it as it is."""
    return _on_device(linear).weight


def _on_device(linear: Linear) -> DeviceLinear:
    assert isinstance(linear, DeviceLinear), linear
    return linear


def empty_activations(n_row: int, n: int, device: torch.device) -> Activations | None:
    """Room for rows rounded to 8 bits; None where rows are not whole runs, and products take floats."""
    return Activations.empty(n_row, n, device) if n % RUN == 0 else None


def choose_device(name: str) -> tuple[torch.device, bool]:
    """The torch device of an `EngineConfig.device`, and whether it counts as an accelerator."""
    if name == "simulated":
        return torch.device("cpu"), True
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu"), False
    if not torch.cuda.is_available():
        raise ConfigError(f"device is '{name}', but PyTorch finds no CUDA device: use device 'cpu'")
    device = torch.device("cuda" if name == "auto" else name)
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device is '{name}', but this machine has {torch.cuda.device_count()} CUDA device(s)")
    return torch.device("cuda", index), True
