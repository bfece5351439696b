"""`PromptProduct` in plain torch, f32, for where there is no GPU: the definition of what it computes."""

import torch
from torch import Tensor

from moe_engine.kernels import reference
from moe_engine.kernels.grouped_sort import Groups, Sorted
from moe_engine.kernels.slot_layout import SlotLayout


class PlainProduct:
    """See `PromptProduct`; everything is on the CPU. Results do not depend on what is added together."""

    LEAST_ROWS = block_m = 16

    def __init__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        n_expert: int,
        layout: SlotLayout,
        workspace: Tensor | None = None,
    ) -> None:
        """As `PromptProduct`, but needs no workspace."""
        self.x, self.ids, self.weights, self.layout = x.float(), ids, weights, layout
        counts = torch.bincount(ids.flatten(), minlength=n_expert)
        self._pairs = ids.flatten().argsort(stable=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.sorted = Sorted(offsets.int(), self._pairs // ids.shape[1], self._pairs.argsort().view(ids.shape))
        self._y = torch.zeros(ids.numel(), layout.hidden)

    def add(self, pool: Tensor, groups: Groups, tiles: tuple[Tensor, Tensor] | None = None) -> None:
        for start, end, slot in zip(groups.starts.tolist(), groups.ends.tolist(), groups.slots.tolist(), strict=True):
            if slot < 0 or start == end:
                continue
            gate, up, down = self.layout.parts(pool[slot])
            rows = self.x[self.sorted.token[start:end]]
            h = torch.nn.functional.silu(reference.matvec(rows, gate)) * reference.matvec(rows, up)
            self._y[self._pairs[start:end]] = reference.matvec(h, down)

    def sum(self, added: Tensor) -> Tensor:
        served = added[self.ids.long()] >= 0
        y = self._y.view(*self.ids.shape, -1)
        total: Tensor = (y * (self.weights * served)[..., None]).sum(dim=1)
        return total


def plain_prompt(x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor, pool: Tensor, layout: SlotLayout) -> Tensor:
    """`moe_prompt` by `PlainProduct`: f32 on the CPU, wherever the tensors are."""
    product = PlainProduct(x.cpu(), ids.cpu(), weights.cpu(), len(slots), layout)
    product.add(pool.cpu(), product.sorted.groups(slots.cpu()))
    return product.sum(slots.cpu())
