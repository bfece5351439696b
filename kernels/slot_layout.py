"""How a cache slot holds an expert: gate, up and down one after the other, as the file's bytes, each aligned."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import QuantType

ALIGNMENT = 16
"""What the parts' offsets and the slots' size are multiples of: the widest load, for any types that follow another."""


def aligned(n_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class SlotPart:
    """A matrix `[n_out, n_in]` that lies `offset` bytes into every slot."""

    type: QuantType
    n_out: int
    n_in: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.n_out * self.type.row_bytes(self.n_in)

    def view(self, slot: Tensor) -> QuantTensor:
        """The matrix in a slot, uint8 `[slot_bytes]`."""
        data = slot[self.offset : self.offset + self.nbytes].view(self.n_out, -1)
        return QuantTensor(data, self.type, self.n_in)


@dataclass(frozen=True)
class SlotLayout:
    """Gate and up `[n_ff, hidden]`, down `[hidden, n_ff]`."""

    gate: SlotPart
    up: SlotPart
    down: SlotPart

    @classmethod
    def of(cls, gate: QuantType, up: QuantType, down: QuantType, hidden: int, n_ff: int) -> "SlotLayout":
        gate_part = SlotPart(gate, n_ff, hidden, 0)
        up_part = SlotPart(up, n_ff, hidden, aligned(gate_part.nbytes))
        return cls(gate_part, up_part, SlotPart(down, hidden, n_ff, aligned(up_part.offset + up_part.nbytes)))

    @classmethod
    def pack(cls, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> tuple["SlotLayout", Tensor]:
        """A dense feed-forward or a shared expert as a pool of one slot, for `moe_decode` with slot 0 and weight 1."""
        layout = cls.of(gate.type, up.type, down.type, gate.n_in, gate.n_out)
        pool = torch.zeros(1, layout.slot_bytes, dtype=torch.uint8, device=gate.data.device)
        for view, part in zip(layout.parts(pool[0]), (gate, up, down), strict=True):
            view.data.copy_(part.data)
        return layout, pool

    @property
    def hidden(self) -> int:
        return self.gate.n_in

    @property
    def n_ff(self) -> int:
        return self.gate.n_out

    @property
    def slot_bytes(self) -> int:
        return aligned(self.down.offset + self.down.nbytes)

    def parts(self, slot: Tensor) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
        """Views of gate, up and down in a slot, uint8 `[slot_bytes]`."""
        return self.gate.view(slot), self.up.view(slot), self.down.view(slot)
