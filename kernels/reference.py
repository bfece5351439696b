"""Operations in plain torch and numpy: the definition of correct, and what runs where there is no GPU."""

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
