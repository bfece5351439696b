"""Where the dense part of a model computes: on the CPU, or on an accelerator (CUDA, or a simulated one).

A backend turns the quantized tensors of the file into callables; the model never asks which backend it is.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moe_engine.errors import ConfigError
from moe_engine.kernels import dequantize as device_kernels
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kernels.decode_product import DECODE_TOKENS, matvec
from moe_engine.kernels.quant_tensor import QuantTensor

Linear = Callable[[Tensor], Tensor]
"""`x` f32 `[n_token, n_in]` to `[n_token, n_out]`, or batched `[n, n_token, n_in]` to `[n, n_token, n_out]`."""

Embedding = Callable[[Tensor], Tensor]
"""Token ids int64 `[n_token]` to rows f32 `[n_token, hidden]`."""


class Backend(Protocol):
    device: torch.device

    def linear(self, weight: QuantTensor) -> Linear: ...

    def embedding(self, weight: QuantTensor) -> Embedding: ...

    def dequantize(self, weight: QuantTensor) -> Tensor:
        """All elements as f32 on the backend's device."""
        ...


class CpuBackend:
    """Multiplies straight from the mapped file with the native kernels."""

    def __init__(self, cpu: CpuKernels) -> None:
        self.device = torch.device("cpu")
        self.cpu = cpu

    def linear(self, weight: QuantTensor) -> Linear:
        return lambda x: self.cpu.linear(x, weight)

    def embedding(self, weight: QuantTensor) -> Embedding:
        return lambda ids: self.cpu.gather(weight, ids)

    def dequantize(self, weight: QuantTensor) -> Tensor:
        return self.cpu.dequantize(weight)


class AcceleratorBackend:
    """Keeps the quantized bytes in VRAM.

    Products dequantize row chunks into one scratch buffer and are exact to f32. With `int8_activations`, those of few
    tokens read the quantized weights directly and round activations to 8 bits.
    """

    def __init__(self, device: torch.device, scratch_elements: int, int8_activations: bool) -> None:
        self.device, self.int8_activations = device, int8_activations
        self.scratch = torch.empty(scratch_elements, dtype=torch.float32, device=device)

    def linear(self, weight: QuantTensor) -> Linear:
        resident = weight.to(self.device)

        def product(x: Tensor) -> Tensor:
            if self.int8_activations and x.shape[-2] <= DECODE_TOKENS:
                return matvec(x.contiguous(), resident)
            return device_kernels.linear(x, resident, self.scratch)

        return product

    def embedding(self, weight: QuantTensor) -> Embedding:
        resident = weight.to(self.device)
        return lambda ids: device_kernels.embedding(resident, ids)

    def dequantize(self, weight: QuantTensor) -> Tensor:
        return device_kernels.dequantize(weight.to(self.device))


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
