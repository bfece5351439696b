"""Routed experts in VRAM: slots filled on demand, evicted by a policy, computed where they lie.

This is the plain, synchronous version: every expert that a token needs is copied into a slot and computed on the
device, so results do not depend on the size of the cache or on what it holds.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_engine.config import format_size
from moe_engine.errors import CapacityError
from moe_engine.kernels.dequantize import linear
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.policies.lru import LRU

Key = tuple[int, int]
"""(layer, expert)."""

_Parts = tuple[QuantTensor, QuantTensor, QuantTensor]
"""Gate, up and down: of a layer as stacks, or of one expert as matrices."""


@dataclass
class SlotClass:
    """The experts whose parts have the same types and shapes, and the slots they share.

    A slot holds gate, up and down one after the other, as the file's bytes.
    """

    slot_bytes: int
    n_expert: int = 0  # in all layers of the class
    slots: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.uint8))  # [n_slot, slot_bytes]
    free: list[int] = field(default_factory=list)
    slot_of: dict[Key, int] = field(default_factory=dict)
    policy: LRU[Key] = field(default_factory=lambda: LRU(0))

    def allocate(self, n_slot: int, device: torch.device) -> None:
        self.slots = torch.empty(n_slot, self.slot_bytes, dtype=torch.uint8, device=device)
        self.free = list(range(n_slot))
        self.policy = LRU(n_slot)

    def take_slot(self) -> int:
        """A free slot, or the victim's."""
        if self.free:
            return self.free.pop()
        victim = self.policy.victim(pinned=())
        assert victim is not None
        return self.slot_of.pop(victim)

    def check_integrity(self) -> None:
        """Every slot is free or holds one expert, and the policy knows exactly the resident ones."""
        held = sorted([*self.free, *self.slot_of.values()])
        assert held == list(range(len(self.slots))), (held, len(self.slots))
        assert len(self.policy) == len(self.slot_of)
        assert all(key in self.policy for key in self.slot_of)


class CachedExperts:
    """Computes all experts on `device` from VRAM slots; see `Experts` for the interface."""

    def __init__(self, device: torch.device, scratch: Tensor) -> None:
        self.device, self.scratch = device, scratch
        self.hits = self.misses = 0
        self.classes: dict[tuple[object, ...], SlotClass] = {}
        self._layers: dict[int, tuple[_Parts, SlotClass]] = {}

    def register(self, layer: int, gate: QuantTensor, up: QuantTensor, down: QuantTensor) -> None:
        parts = (gate, up, down)
        shapes = tuple((part.type, part.shape[1:]) for part in parts)
        slot_bytes = sum(part[0].nbytes for part in parts)
        slot_class = self.classes.setdefault(shapes, SlotClass(slot_bytes))
        slot_class.n_expert += gate.shape[0]
        self._layers[layer] = (parts, slot_class)

    def min_bytes(self, top_k: int) -> int:
        """What `allocate` needs at least: room for one token's experts in every class."""
        return sum(c.slot_bytes * min(top_k, c.n_expert) for c in self.classes.values())

    def allocate(self, budget: int, top_k: int, limit: int | None) -> None:
        """Takes slots for at most `budget` bytes, at most `limit` a class, shared out by the classes' sizes."""
        total = sum(c.slot_bytes * c.n_expert for c in self.classes.values())
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
        """See `Experts`. Resident experts are computed first, so that loading others cannot evict them unused."""
        parts, slot_class = self._layers[layer]
        outputs = x.new_empty(*expert_ids.shape, x.shape[1])  # [n_token, top_k, hidden]
        needed = {(layer, e) for e in expert_ids.unique().tolist()}
        order = sorted(needed, key=lambda key: (key not in slot_class.slot_of, key))
        for key in order:
            gate, up, down = self._resident(key, parts, slot_class)
            token, choice = (expert_ids == key[1]).nonzero(as_tuple=True)
            rows = x[token]
            activated = torch.nn.functional.silu(linear(rows, gate, self.scratch)) * linear(rows, up, self.scratch)
            outputs[token, choice] = linear(activated, down, self.scratch)
        # One sum in router order, whatever the order of computation was.
        total: Tensor = (outputs * weights[..., None]).sum(dim=1)
        return total

    def _resident(self, key: Key, parts: _Parts, slot_class: SlotClass) -> _Parts:
        """The expert's matrices as views of its slot, copied there first if need be."""
        slot = slot_class.slot_of.get(key)
        if slot is not None:
            self.hits += 1
            slot_class.policy.touch(key)
        else:
            self.misses += 1
            slot = slot_class.take_slot()
            start = 0
            for part in parts:
                blob = part[key[1]].data.reshape(-1)
                slot_class.slots[slot, start : start + blob.numel()].copy_(blob)
                start += blob.numel()
            slot_class.slot_of[key] = slot
            slot_class.policy.insert(key)
        return _slot_views(slot_class.slots[slot], parts)

    def check_integrity(self) -> None:
        for slot_class in self.classes.values():
            slot_class.check_integrity()


def _slot_views(slot: Tensor, parts: _Parts) -> _Parts:
    start, views = 0, []
    for part in parts:
        shape = part.data.shape[1:]
        views.append(QuantTensor(slot[start : start + shape.numel()].view(shape), part.type, part.n_in))
        start += shape.numel()
    gate, up, down = views
    return gate, up, down
