"""The (token, choice) pairs of a prompt in the order of their experts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Some rows of those sorted by expert, all int32 `[n_group]`. Group g holds rows `starts[g]` to `ends[g]` and
    multiplies the matrix in `slots[g]`; where that is -1 its rows are not computed."""

    starts: Tensor
    ends: Tensor
    slots: Tensor

    def __post_init__(self) -> None:
        assert self.starts.dtype == self.ends.dtype == self.slots.dtype == torch.int32, self
        assert self.starts.shape == self.ends.shape == self.slots.shape, self

    def __len__(self) -> int:
        return self.slots.numel()

    def part(self, start: int, stop: int) -> "Groups":
        return Groups(self.starts[start:stop], self.ends[start:stop], self.slots[start:stop])


@dataclass(frozen=True)
class Sorted:
    """(token, choice) pairs in the order of their experts, pairs of one expert in the order of tokens."""

    offsets: Tensor  # int32 [n_expert + 1]: where each expert's rows begin
    token: Tensor  # int32 [n_token * top_k]: the token of each row
    place: Tensor  # int32 [n_token, top_k]: the row of each pair

    def groups(self, slots: Tensor) -> Groups:
        """All experts. slots: int32 `[n_expert]`."""
        return Groups(self.offsets[:-1], self.offsets[1:], slots)


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
