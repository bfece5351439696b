"""Operations in plain torch and numpy: the definition of correct, and what runs where there is no GPU."""

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from moe_engine.kernels.quant_tensor import QuantTensor


def dequantize(weight: QuantTensor) -> torch.Tensor:
    """The values of `weight`: f32 `[..., n_out, n_in]` in memory of its own. The data must be on the CPU."""
    data = np.ascontiguousarray(weight.data.numpy())
    with np.errstate(all="ignore"):  # damaged files hold infinite scales; the sampler reports the outcome
        values = quants.dequantize(data, GGMLQuantizationType(weight.type.id))
    if np.may_share_memory(values, data):  # F32 comes back as a view of the (read-only, unaligned) file
        values = values.copy()
    return torch.from_numpy(values).view(weight.shape)


def matvec(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """x W^T in f32: x `[..., n_token, n_in]` and weight `[..., n_out, n_in]` to `[..., n_token, n_out]`."""
    return x.float() @ dequantize(weight).transpose(-1, -2)


def moe_decode(
    x: torch.Tensor,
    expert: Callable[[int], tuple[QuantTensor, QuantTensor, QuantTensor]],
    slots: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts: x `[n_token, hidden]` to f32 `[n_token, hidden]`.

    expert: a slot's gate, up and down. slots: int32 `[n_token, top_k]`, -1 adds nothing. weights: f32, likewise.
    """
    y = torch.zeros(x.shape, dtype=torch.float32)
    for token, choice in (slots >= 0).nonzero().tolist():
        gate, up, down = expert(int(slots[token, choice]))
        row = x[token : token + 1]
        h = torch.nn.functional.silu(matvec(row, gate)) * matvec(row, up)
        y[token] += weights[token, choice] * matvec(h, down)[0]
    return y
