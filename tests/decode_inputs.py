"""Random weights and inputs of the decode products, and what their values are."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from random_blocks import random_blocks
from torch import Tensor

from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import QUANT_TYPES, QuantType

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = list(QUANT_TYPES.values())
all_types = pytest.mark.parametrize("type", TYPES, ids=str)


def place(data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], offset: int = 0) -> Tensor:
    """A copy on the device that starts `offset` bytes into a buffer of other bytes."""
    buffer = torch.full((offset + data.size + 64,), 0xAA, dtype=torch.uint8, device=DEVICE)
    return buffer[offset : offset + data.size].view(data.shape).copy_(torch.from_numpy(data.copy()))


def random_weight(type: QuantType, n_out: int, n_in: int, seed: int = 0, offset: int = 0) -> QuantTensor:
    return QuantTensor(place(random_blocks(type, n_out, n_in, np.random.default_rng(seed)), offset), type, n_in)


def values(weight: QuantTensor) -> Tensor:
    """F64 on the CPU."""
    data = np.ascontiguousarray(weight.data.cpu().numpy())
    floats = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType(weight.type.id)).copy())
    return floats.view(weight.shape).double()


def random_input(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative, over the whole tensor; not a number if `actual` holds one."""
    return float((actual.cpu().double() - exact).norm() / exact.norm())


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)
