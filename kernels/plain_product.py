"""`PromptProduct` in plain torch, f32, for where there is no GPU: the definition of what it computes."""

import torch
from torch import Tensor

from moe_engine.kernels import reference
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
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        self._y = torch.zeros(*ids.shape, layout.hidden)

    def add(self, pool: Tensor, slots: Tensor, first: int = 0, tiles: tuple[Tensor, Tensor] | None = None) -> None:
        for expert, slot in enumerate(slots.tolist(), first):
            token, choice = (self.ids == expert).nonzero(as_tuple=True)
            if slot < 0 or not len(token):
                continue
            gate, up, down = self.layout.parts(pool[slot])
            rows = self.x[token]
            h = torch.nn.functional.silu(reference.matvec(rows, gate)) * reference.matvec(rows, up)
            self._y[token, choice] = reference.matvec(h, down)

    def sum(self, added: Tensor) -> Tensor:
        served = added[self.ids.long()] >= 0
        total: Tensor = (self._y * (self.weights * served)[..., None]).sum(dim=1)
        return total


def plain_prompt(x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor, pool: Tensor, layout: SlotLayout) -> Tensor:
    """`moe_prompt` by `PlainProduct`: f32 on the CPU, wherever the tensors are."""
    product = PlainProduct(x.cpu(), ids.cpu(), weights.cpu(), len(slots), layout)
    product.add(pool.cpu(), slots.cpu())
    return product.sum(slots.cpu())
