"""How a cache slot holds an expert: gate, up and down one after the other, as the file's bytes."""

from dataclasses import dataclass

from torch import Tensor

from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import QuantType


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
        up_part = SlotPart(up, n_ff, hidden, gate_part.nbytes)
        return cls(gate_part, up_part, SlotPart(down, hidden, n_ff, gate_part.nbytes + up_part.nbytes))

    @property
    def hidden(self) -> int:
        return self.gate.n_in

    @property
    def n_ff(self) -> int:
        return self.gate.n_out

    @property
    def slot_bytes(self) -> int:
        return self.down.offset + self.down.nbytes

    def parts(self, slot: Tensor) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
        """Views of gate, up and down in a slot, uint8 `[slot_bytes]`."""
        return self.gate.view(slot), self.up.view(slot), self.down.view(slot)
