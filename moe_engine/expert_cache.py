"""Routed experts in VRAM: slot pools, the slot table that the GPU's router reads, and the plain path over them.

Decode steps on a GPU use pools and table through their graph (decode_step.py), and a native worker moves experts in and
out meanwhile (kernels/worker.py). Calling the object is the path for prompts and the reference for the fast one:
synchronous, what is not in a slot is copied into a staging slot and computed there, nothing is evicted. Its results do
not depend on what is cached.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_engine.config import format_size
from moe_engine.errors import CapacityError
from moe_engine.expert_store import ExpertStore
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle
from moe_engine.kernels.decode_product import moe_decode
from moe_engine.kernels.dequantize import linear
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.slot_layout import SlotLayout

Key = tuple[int, int]
"""(MoE layer, expert); MoE layers are numbered in order, without the dense ones."""


@dataclass
class SlotPool:
    """The slots that all layers with the same layout share, and a few more for staging."""

    layout: SlotLayout
    layers: list[int] = field(default_factory=list)  # MoE layers
    slots: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.uint8))  # [n_slot, slot_bytes]
    staging: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.uint8))  # [n_stage, slot_bytes]


class CachedExperts:
    """See `Experts` for the interface. Without slots everything is computed on the CPU.

    scratch: flat f32 on `device`, room for dequantized rows. n_stage: staging slots of a pool, 0: there are no slots
    at all.
    """

    def __init__(self, device: torch.device, scratch: Tensor, cpu: CpuKernels, n_stage: int) -> None:
        self.device, self.scratch, self.cpu, self.n_stage = device, scratch, cpu, n_stage
        self.hits = self.misses = 0
        self.n_expert = 0
        self.index: dict[int, int] = {}  # MoE layer of a model's layer
        self.handles: list[ExpertHandle] = []  # in RAM, by MoE layer
        self.pools: dict[SlotLayout, SlotPool] = {}
        self.slot_table = torch.empty(0, 0, dtype=torch.int32)  # [n_layer, n_expert]: slot or -1
        self.layouts: list[SlotLayout] = []  # by MoE layer
        self._store = ExpertStore()

    @property
    def caches(self) -> bool:
        """Whether there are slots."""
        return self.n_stage > 0

    def register(self, layer: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> None:
        self.n_expert, n_ff, hidden = gate.shape
        layout = SlotLayout.of(gate.type, up.type, down.type, hidden, n_ff)
        if self.caches and self.device.type == "cuda":
            gate, up, down = self._store.add(layout, (gate, up, down))
        self.index[layer] = len(self.handles)
        self.handles.append(self.cpu.register_experts(gate, up, down))
        self.layouts.append(layout)
        self.pools.setdefault(layout, SlotPool(layout)).layers.append(self.index[layer])

    def slots_of(self, index: int) -> tuple[SlotLayout, Tensor]:
        """Layout and slots of a MoE layer."""
        pool = self.pools[self.layouts[index]]
        return pool.layout, pool.slots

    def min_bytes(self, n_choice: int) -> int:
        """What `allocate` needs at least: slots for `n_choice` experts in every pool, and staging."""
        least = ((layout, self.n_stage + min(n_choice, self._size(pool))) for layout, pool in self.pools.items())
        return sum(layout.slot_bytes * n_slot for layout, n_slot in least)

    def _size(self, pool: SlotPool) -> int:
        return len(pool.layers) * self.n_expert

    def allocate(self, budget: int, n_choice: int, limit: int | None) -> None:
        """Takes slots for at most `budget` bytes, at most `limit` a pool, shared out by the pools' sizes.

        n_choice: experts that one layer of a step may need at once.
        """
        if not self.caches:
            self._allocate(dict.fromkeys(self.pools, 0))
            return
        least = self.min_bytes(n_choice)
        if budget < least:
            raise CapacityError(
                f"{format_size(max(budget, 0))} of VRAM is left for experts, but one step needs "
                f"{format_size(least)}: raise vram_budget, or use experts='cpu'"
            )
        total = sum(layout.slot_bytes * self._size(pool) for layout, pool in self.pools.items())
        sizes = {}
        for layout, pool in self.pools.items():
            size = self._size(pool)
            n_slot = min(size, min(n_choice, size) + (budget - least) * size // max(1, total))
            sizes[layout] = n_slot if limit is None else min(n_slot, limit)
        self._allocate(sizes)

    def _allocate(self, sizes: dict[SlotLayout, int]) -> None:
        for layout, n_slot in sizes.items():
            memory = torch.empty(n_slot + self.n_stage, layout.slot_bytes, dtype=torch.uint8, device=self.device)
            self.pools[layout].slots, self.pools[layout].staging = memory.split([n_slot, self.n_stage])
        self.slot_table = torch.full((len(self.handles), self.n_expert), -1, dtype=torch.int32, device=self.device)

    @property
    def n_slot(self) -> int:
        return sum(len(pool.slots) for pool in self.pools.values())

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every expert."""
        return all(len(pool.slots) == self._size(pool) for pool in self.pools.values())

    def fill(self, reserve: Callable[[int, int], int | None] | None = None) -> None:
        """Loads the first experts of each layer. reserve: `(layer, expert)` to a slot, None where none is left."""
        if reserve is None:
            left = {layout: iter(range(len(pool.slots))) for layout, pool in self.pools.items()}

            def reserve(layer: int, expert: int) -> int | None:
                return next(left[self.layouts[layer]], None)

        for expert in range(self.n_expert if self.caches else 0):
            for layer in range(len(self.handles)):
                slot = reserve(layer, expert)
                if slot is not None:
                    self.load((layer, expert), slot)

    def load(self, key: Key, slot: int) -> None:
        """Copies an expert into a slot and enters it in the table, in the order of the current stream.

        Within `torch.inference_mode`, as all that writes to the tensors made at load.
        """
        layer, expert = key
        self._copy(key, self.pools[self.layouts[layer]].slots[slot])
        self.slot_table[layer, expert] = slot

    def _copy(self, key: Key, slot: Tensor) -> None:
        layer, expert = key
        handle = self.handles[layer]
        for part, view in zip((handle.gate, handle.up, handle.down), self.layouts[layer].parts(slot), strict=True):
            view.data.copy_(part[expert].data, non_blocking=True)

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`. Expert by expert: dequantizes and multiplies."""
        index = self.index[layer]
        if not self.caches:
            expert_ids = expert_ids.cpu()
            self.misses += len(expert_ids.unique())
            return self.cpu.expert_ffn(self.handles[index], x.cpu(), expert_ids, weights.cpu()).to(x.device)
        pool = self.pools[self.layouts[index]]
        resident = self.slot_table[index].tolist()
        outputs = x.new_empty(*expert_ids.shape, x.shape[1])  # [n_token, top_k, hidden]
        for expert in expert_ids.unique().tolist():
            slot = resident[expert]
            self.hits, self.misses = self.hits + (slot >= 0), self.misses + (slot < 0)
            place = pool.slots[slot] if slot >= 0 else pool.staging[0]
            if slot < 0:
                self._copy((index, expert), place)
            gate, up, down = pool.layout.parts(place)
            token, choice = (expert_ids == expert).nonzero(as_tuple=True)
            rows = x[token]
            activated = torch.nn.functional.silu(linear(rows, gate, self.scratch)) * linear(rows, up, self.scratch)
            outputs[token, choice] = linear(activated, down, self.scratch)
        # One sum in router order, whatever the order of computation was.
        total: Tensor = (outputs * weights[..., None]).sum(dim=1)
        return total

    def staged(self, index: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The sums of a MoE layer for a few tokens with the kernels of the decode step, all experts in staging slots.

        expert_ids: int32, -1 for none; otherwise as in `Experts`.
        """
        if not self.caches:
            return self.cpu.expert_ffn(self.handles[index], x.cpu(), expert_ids.cpu(), weights.cpu()).to(x.device)
        pool, place = self.pools[self.layouts[index]], expert_ids.tolist()
        chosen = sorted({expert for row in place for expert in row if expert >= 0})
        for slot, expert in enumerate(chosen):
            self._copy((index, expert), pool.staging[slot])
        slots = [[chosen.index(expert) if expert >= 0 else -1 for expert in row] for row in place]
        return moe_decode(x, pool.staging, pool.layout, torch.tensor(slots, dtype=torch.int32).to(x.device), weights)

    def close(self) -> None:
        self._store.close()
        self.handles.clear()
        self.pools.clear()
