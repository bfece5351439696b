"""Experts that come from tensors instead of a file, for tests of what uses a store."""

from collections.abc import Sequence

from torch import Tensor

from moe_engine.expert_store import ExpertStore
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.slot_layout import SlotLayout


class TensorStore(ExpertStore):
    def __init__(self, cpu: CpuKernels) -> None:
        self.cpu, self.handles = cpu, list[ExpertHandle]()

    def register(self, block: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> ExpertHandle:
        self.handles.append(self.cpu.register_experts(gate, up, down))
        return self.handles[-1]

    def copy(self, index: int, experts: Sequence[int], slots: Tensor) -> None:
        handle = self.handles[index]
        parts = (handle.gate, handle.up, handle.down)
        types = handle.gate.type, handle.up.type, handle.down.type
        layout = SlotLayout.of(*types, handle.gate.n_in, handle.gate.n_out)
        for expert, slot in zip(experts, slots, strict=True):
            for view, part in zip(layout.parts(slot), parts, strict=True):
                view.data.copy_(part[expert].data)

    def close(self) -> None:
        self.handles.clear()
