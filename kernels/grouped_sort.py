"""The (token, choice) pairs of a prompt in the order of their experts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert. Group g holds rows `offsets[g]` to `offsets[g + 1]` and multiplies the matrix in
    `slots[g]`; where that is -1 its rows are not computed."""

    offsets: Tensor  # int32 [n_group + 1]
    slots: Tensor  # int32 [n_group]

    def __post_init__(self) -> None:
        assert self.offsets.dtype == self.slots.dtype == torch.int32, (self.offsets.dtype, self.slots.dtype)
        assert self.offsets.numel() == self.slots.numel() + 1, (self.offsets.shape, self.slots.shape)

    def __len__(self) -> int:
        return self.slots.numel()


@dataclass(frozen=True)
class Sorted:
    """(token, choice) pairs in the order of their experts, pairs of one expert in the order of tokens."""

    offsets: Tensor  # int32 [n_expert + 1]: where each expert's rows begin
    token: Tensor  # int32 [n_token * top_k]: the token of each row
    place: Tensor  # int32 [n_token, top_k]: the row of each pair


def sort_by_expert(ids: Tensor, n_expert: int) -> Sorted:
    """ids: int `[n_token, top_k]`."""
    from moe_engine.kernels.grouped_kernels import sort_kernel

    ids = ids.contiguous()
    offsets, token, place = (
        torch.empty(n, dtype=torch.int32, device=ids.device) for n in (n_expert + 1, ids.numel(), ids.numel())
    )
    block = min(8192, max(128, 1 << (ids.numel() - 1).bit_length()))
    with torch.cuda.device_of(ids):
        sort_kernel[n_expert,](ids, offsets, token, place, ids.numel(), TOP_K=ids.shape[1], BLOCK=block, num_warps=8)
    return Sorted(offsets, token, place.view(ids.shape))
