"""Routed experts in VRAM: slots filled on demand, evicted by a policy, computed where they lie.

This is the plain, synchronous version: every expert that a token needs is copied into a slot and computed on the
device, so results do not depend on the size of the cache or on what it holds.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_engine.config import format_size
from moe_engine.errors import CapacityError
from moe_engine.kernels.decode_product import DECODE_TOKENS, moe_decode
from moe_engine.kernels.dequantize import linear
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.slot_layout import SlotLayout
from moe_engine.policies.lru import LRU

Key = tuple[int, int]
"""(layer, expert)."""

_Parts = tuple[QuantTensor, QuantTensor, QuantTensor]
"""Gate, up and down of a layer as stacks, in RAM."""


@dataclass
class SlotClass:
    """The experts whose parts have the same types and shapes, and the slots they share."""

    layout: SlotLayout
    n_expert: int = 0  # in all layers of the class
    slots: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.uint8))  # [n_slot, slot_bytes]
    free: list[int] = field(default_factory=list)
    slot_of: dict[Key, int] = field(default_factory=dict)
    policy: LRU[Key] = field(default_factory=lambda: LRU(0))

    def allocate(self, n_slot: int, device: torch.device) -> None:
        self.slots = torch.empty(n_slot, self.layout.slot_bytes, dtype=torch.uint8, device=device)
        self.free = list(range(n_slot))
        self.policy = LRU(n_slot)

    def take_slot(self, pinned: Collection[Key]) -> int:
        """A free slot, or that of a victim which is not pinned."""
        if self.free:
            return self.free.pop()
        victim = self.policy.victim(pinned)
        assert victim is not None
        return self.slot_of.pop(victim)

    def check_integrity(self) -> None:
        """Every slot is free or holds one expert, and the policy knows exactly the resident ones."""
        held = sorted([*self.free, *self.slot_of.values()])
        assert held == list(range(len(self.slots))), (held, len(self.slots))
        assert len(self.policy) == len(self.slot_of)
        assert all(key in self.policy for key in self.slot_of)


class CachedExperts:
    """Computes all experts on `device` from VRAM slots; see `Experts` for the interface.

    scratch: flat f32, room for dequantized rows. int8_activations: few tokens use the fused decode kernels, which
    round activations to 8 bits.
    """

    def __init__(self, device: torch.device, scratch: Tensor, int8_activations: bool) -> None:
        self.device, self.scratch, self.int8_activations = device, scratch, int8_activations
        self.hits = self.misses = 0
        self.classes: dict[SlotLayout, SlotClass] = {}
        self._layers: dict[int, tuple[_Parts, SlotClass]] = {}

    def register(self, layer: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> None:
        n_expert, n_ff, hidden = gate.shape
        layout = SlotLayout.of(gate.type, up.type, down.type, hidden, n_ff)
        slot_class = self.classes.setdefault(layout, SlotClass(layout))
        slot_class.n_expert += n_expert
        self._layers[layer] = ((gate, up, down), slot_class)

    def min_bytes(self, top_k: int) -> int:
        """What `allocate` needs at least: room for one token's experts in every class."""
        return sum(layout.slot_bytes * min(top_k, c.n_expert) for layout, c in self.classes.items())

    def allocate(self, budget: int, top_k: int, limit: int | None) -> None:
        """Takes slots for at most `budget` bytes, at most `limit` a class, shared out by the classes' sizes."""
        total = sum(layout.slot_bytes * c.n_expert for layout, c in self.classes.items())
        if budget < self.min_bytes(top_k):
            raise CapacityError(
                f"{format_size(max(budget, 0))} of VRAM is left for experts, but one token needs "
                f"{format_size(self.min_bytes(top_k))}: raise vram_budget, or use experts='cpu'"
            )
        spare = budget - self.min_bytes(top_k)
        for slot_class in self.classes.values():
            least = min(top_k, slot_class.n_expert)
            share = spare * slot_class.n_expert // max(1, total)
            n_slot = min(least + share, slot_class.n_expert)
            slot_class.allocate(n_slot if limit is None else min(n_slot, limit), self.device)

    @property
    def n_slot(self) -> int:
        return sum(len(c.slots) for c in self.classes.values())

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        slot_class = self._layers[layer][1]
        rows = expert_ids.tolist()
        needed = {(layer, e) for row in rows for e in row}
        fits = len(needed) <= len(slot_class.slots)
        if not self.int8_activations or len(x) > DECODE_TOKENS or (len(x) == 1 and not fits):
            return self._one_by_one(layer, x, expert_ids, weights, needed)
        if fits:
            slots = {key: self._resident(key, pinned=needed) for key in sorted(needed)}
            table = torch.tensor([[slots[layer, e] for e in row] for row in rows], dtype=torch.int32)
            return moe_decode(x, slot_class.slots, slot_class.layout, table.to(x.device), weights)
        # A small cache takes the tokens in parts; a token's result does not depend on the others.
        parts = (slice(0, len(x) // 2), slice(len(x) // 2, len(x)))
        return torch.cat([self(layer, x[part], expert_ids[part], weights[part]) for part in parts])

    def _one_by_one(self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, needed: set[Key]) -> Tensor:
        """Dequantizes and multiplies expert by expert, residents first: loading others could evict them unused."""
        slot_class = self._layers[layer][1]
        outputs = x.new_empty(*expert_ids.shape, x.shape[1])  # [n_token, top_k, hidden]
        for key in sorted(needed, key=lambda key: (key not in slot_class.slot_of, key)):
            gate, up, down = slot_class.layout.parts(slot_class.slots[self._resident(key, pinned=())])
            token, choice = (expert_ids == key[1]).nonzero(as_tuple=True)
            rows = x[token]
            activated = torch.nn.functional.silu(linear(rows, gate, self.scratch)) * linear(rows, up, self.scratch)
            outputs[token, choice] = linear(activated, down, self.scratch)
        # One sum in router order, whatever the order of computation was.
        total: Tensor = (outputs * weights[..., None]).sum(dim=1)
        return total

    def _resident(self, key: Key, pinned: Collection[Key]) -> int:
        """The expert's slot; if it has none, it is copied into one that no pinned expert holds."""
        layer, expert = key
        parts, slot_class = self._layers[layer]
        slot = slot_class.slot_of.get(key)
        if slot is not None:
            self.hits += 1
            slot_class.policy.touch(key)
            return slot
        self.misses += 1
        slot = slot_class.take_slot(pinned)
        for part, view in zip(parts, slot_class.layout.parts(slot_class.slots[slot]), strict=True):
            view.data.copy_(part[expert].data)
        slot_class.slot_of[key] = slot
        slot_class.policy.insert(key)
        return slot

    def check_integrity(self) -> None:
        for slot_class in self.classes.values():
            slot_class.check_integrity()
