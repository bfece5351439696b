"""Routed experts in VRAM: slot pools, the slot table that the GPU's router reads, and the plain path over them.

Decode steps on a GPU use pools and table through their graph (decode_step.py), and a native worker moves experts in and
out meanwhile (kernels/worker.py). Calling the object is the path for prompts (prompt_experts.py), or, with float
activations, expert by expert the reference for it: results do not depend on what is cached then. Nothing is evicted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

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
from moe_engine.placement import Home, uses_slots
from moe_engine.prompt_experts import PromptExperts

Key = tuple[int, int]
"""(MoE layer, expert); MoE layers are numbered in order, without the dense ones."""


@dataclass
class SlotPool:
    """The slots that all layers with the same layout share, or those of one placed layer."""

    layout: SlotLayout
    layers: list[int] = field(default_factory=list)  # MoE layers
    slots: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.uint8))  # [n_slot, slot_bytes]


class CachedExperts:
    """See `Experts` for the interface. Without slots everything is computed on the CPU.

    scratch: flat f32 on `device`, room for dequantized rows. caches: whether there are to be slots that layers share.
    homes: where the experts of placed layers are, by the model's layer.
    """

    def __init__(
        self,
        device: torch.device,
        scratch: Tensor,
        cpu: CpuKernels,
        caches: bool,
        store: ExpertStore,
        homes: Mapping[int, Home],
    ) -> None:
        self.device, self.scratch, self.cpu, self.caches = device, scratch, cpu, caches
        self.store, self.homes = store, homes
        self.hits = self.misses = 0
        self.n_expert = 0
        self.index: dict[int, int] = {}  # MoE layer of a model's layer
        self.handles: list[ExpertHandle] = []  # in RAM, by MoE layer
        self.pools: dict[SlotLayout, SlotPool] = {}
        self.own_pools: dict[int, SlotPool] = {}  # by MoE layer: with a slot for each expert, or with none
        self.slot_table = torch.empty(0, 0, dtype=torch.int32)  # [n_layer, n_expert]: slot or -1
        self.layouts: list[SlotLayout] = []  # by MoE layer
        self.staging = torch.empty(0, dtype=torch.uint8)  # bytes that experts pass through
        self.prompt: PromptExperts | None = None  # where its kernels run

    def register(self, layer: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> None:
        self.n_expert, n_ff, hidden = gate.shape
        layout = SlotLayout.of(gate.type, up.type, down.type, hidden, n_ff)
        home = self.homes.get(layer, "cache")
        self.index[layer] = len(self.handles)
        self.handles.append(self.store.register(layer, gate, up, down))
        self.layouts.append(layout)
        pool = self.pools.setdefault(layout, SlotPool(layout)) if uses_slots(home) else SlotPool(layout)
        pool.layers.append(self.index[layer])
        if not uses_slots(home):
            n_slot = self.n_expert if home == "vram" else 0
            pool.slots = torch.empty(n_slot, layout.slot_bytes, dtype=torch.uint8, device=self.device)
            self.own_pools[self.index[layer]] = pool

    def pool_of(self, index: int) -> SlotPool:
        """The pool of a MoE layer."""
        return self.own_pools.get(index) or self.pools[self.layouts[index]]

    def _size(self, pool: SlotPool) -> int:
        return len(pool.layers) * self.n_expert

    def allocate(self, budget: int, n_choice: int, limit: int | None, staging: int, n_stage: int) -> None:
        """Takes slots for at most `budget` bytes, at most `limit` a pool, shared out by the pools' sizes.

        n_choice: experts that one layer of a step may need at once. staging: bytes of the budget that experts pass
        through, where not all get a slot; at least n_stage experts.
        """
        if not self.caches:
            self._allocate(dict.fromkeys(self.pools, 0), 0)
            return
        total = sum(layout.slot_bytes * self._size(pool) for layout, pool in self.pools.items())
        least_staging = n_stage * max((layout.slot_bytes for layout in self.pools), default=0)
        staging = least_staging if limit is None and budget >= total + least_staging else max(staging, least_staging)
        least = {layout: min(n_choice, self._size(pool)) for layout, pool in self.pools.items()}
        needed = staging + sum(layout.slot_bytes * n_slot for layout, n_slot in least.items())
        if budget < needed:
            raise CapacityError(
                f"{format_size(max(budget, 0))} of VRAM is left for experts, but one step needs "
                f"{format_size(needed)}: raise vram_budget, or use experts='cpu'"
            )
        sizes = {}
        for layout, pool in self.pools.items():
            size = self._size(pool)
            n_slot = min(size, least[layout] + (budget - needed) * size // max(1, total))
            sizes[layout] = n_slot if limit is None else min(n_slot, limit)
        self._allocate(sizes, staging)

    def _allocate(self, sizes: dict[SlotLayout, int], staging: int) -> None:
        for layout, pool in self.pools.items():
            pool.slots = torch.empty(sizes[layout], layout.slot_bytes, dtype=torch.uint8, device=self.device)
        self.staging = torch.empty(staging, dtype=torch.uint8, device=self.device)
        self.slot_table = torch.full((len(self.handles), self.n_expert), -1, dtype=torch.int32, device=self.device)

    def _staging_slots(self, layout: SlotLayout, n_slot: int) -> Tensor:
        """The staging memory as slots, for use in order of the current stream: uint8 `[n_slot, slot_bytes]`."""
        return self.staging[: n_slot * layout.slot_bytes].view(n_slot, layout.slot_bytes)

    @property
    def _all_pools(self) -> list[SlotPool]:
        return [*self.pools.values(), *self.own_pools.values()]

    @property
    def n_slot(self) -> int:
        return sum(len(pool.slots) for pool in self._all_pools)

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every expert."""
        return all(len(pool.slots) == self._size(pool) for pool in self._all_pools)

    def fill(self) -> None:
        """Loads placed layers and the first experts of the others, in the order of the current stream."""
        self.load_placed()
        for pool in self.pools.values():
            for slot, key in enumerate(islice(self.by_number(pool.layers), len(pool.slots))):
                self.load(key, slot)

    def load_placed(self, slot_of: Callable[[int, int], int] = lambda layer, expert: expert) -> None:
        """Loads the layers that are in VRAM for good. slot_of: `(layer, expert)` to a free slot of the layer."""
        for index, pool in self.own_pools.items():
            for expert in range(len(pool.slots)):
                self.load((index, expert), slot_of(index, expert))

    def by_number(self, layers: Sequence[int]) -> Iterator[Key]:
        """Experts of MoE layers, the first one of each layer first."""
        return ((layer, expert) for expert in range(self.n_expert) for layer in layers)

    def load(self, key: Key, slot: int) -> None:
        """Copies an expert into a slot and enters it in the table, in the order of the current stream.

        Within `torch.inference_mode`, as all that writes to the tensors made at load.
        """
        layer, expert = key
        self.store.copy(layer, [expert], self.pool_of(layer).slots[slot : slot + 1])
        self.slot_table[layer, expert] = slot

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        index = self.index[layer]
        if self._is_on_cpu(index):
            expert_ids = expert_ids.cpu()
            self.misses += len(expert_ids.unique())
            return self.cpu.expert_ffn(self.handles[index], x.cpu(), expert_ids, weights.cpu()).to(x.device)
        if self.prompt is not None:
            return self.prompt(index, x, expert_ids, weights)
        return self._one_by_one(index, x, expert_ids, weights)

    def _one_by_one(self, index: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Dequantizes each expert and multiplies, in f32."""
        pool, resident = self.pool_of(index), self.slot_table[index].tolist()
        staging = self._staging_slots(pool.layout, 1)
        outputs = x.new_empty(*expert_ids.shape, x.shape[1])  # [n_token, top_k, hidden]
        for expert in expert_ids.unique().tolist():
            slot = resident[expert]
            self.hits, self.misses = self.hits + (slot >= 0), self.misses + (slot < 0)
            place = pool.slots[slot] if slot >= 0 else staging[0]
            if slot < 0:
                self.store.copy(index, [expert], staging[:1])
            gate, up, down = pool.layout.parts(place)
            token, choice = (expert_ids == expert).nonzero(as_tuple=True)
            rows = x[token]
            activated = torch.nn.functional.silu(linear(rows, gate, self.scratch)) * linear(rows, up, self.scratch)
            outputs[token, choice] = linear(activated, down, self.scratch)
        # One sum in router order, whatever the order of computation was.
        total: Tensor = (outputs * weights[..., None]).sum(dim=1)
        return total

    def _is_on_cpu(self, index: int) -> bool:
        """Whether the CPU computes all experts of a MoE layer."""
        return not len(self.own_pools[index].slots) if index in self.own_pools else not self.caches

    def staged(self, index: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The sums of a MoE layer for a few tokens with the kernels of the decode step, all experts in staging slots.

        expert_ids: int32, -1 for none; otherwise as in `Experts`.
        """
        if self._is_on_cpu(index):
            return self.cpu.expert_ffn(self.handles[index], x.cpu(), expert_ids.cpu(), weights.cpu()).to(x.device)
        layout, place = self.layouts[index], expert_ids.tolist()
        if index in self.own_pools:
            table = self.slot_table[index].tolist()
            slots = [[table[expert] if expert >= 0 else -1 for expert in row] for row in place]
            held = self.own_pools[index].slots
            return moe_decode(x, held, layout, torch.tensor(slots, dtype=torch.int32).to(x.device), weights)
        chosen = sorted({expert for row in place for expert in row if expert >= 0})
        staging = self._staging_slots(layout, len(chosen))
        for slot, expert in enumerate(chosen):
            self.store.copy(index, [expert], staging[slot : slot + 1])
        slots = [[chosen.index(expert) if expert >= 0 else -1 for expert in row] for row in place]
        return moe_decode(x, staging, layout, torch.tensor(slots, dtype=torch.int32).to(x.device), weights)

    def close(self) -> None:
        try:
            if self.prompt is not None:
                self.prompt.close()
        finally:
            self.prompt = None
            self.store.close()
            self.handles.clear()
            self.pools.clear()
            self.own_pools.clear()
