"""The native slot cache against a plain model whose victims are chosen by `policies.lru`."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_engine.kernels._cpu import SlotCache
from moe_engine.policies.lru import LRU

N_EXPERT, SLOT_CLASS = 5, [0, 1, 0, 1]
KEYS = range(N_EXPERT * len(SLOT_CLASS))


@dataclass
class Model:
    """What should be where."""

    n_slot: list[int]
    in_flight: dict[int, int] = field(default_factory=dict)  # slot by key
    resident: dict[int, int] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.policies = [LRU[int](max(1, n)) for n in self.n_slot]

    def policy(self, key: int) -> LRU[int]:
        return self.policies[SLOT_CLASS[key // N_EXPERT]]

    def held(self, slot_class: int) -> list[int]:
        return [k for k in (*self.in_flight, *self.resident) if SLOT_CLASS[k // N_EXPERT] == slot_class]

    def begin(self, layer: int, experts: list[int]) -> None:
        self.pinned = {layer * N_EXPERT + expert for expert in experts if expert >= 0}
        for expert in experts:
            if layer * N_EXPERT + expert in self.resident and expert >= 0:
                self.policy(layer * N_EXPERT + expert).touch(layer * N_EXPERT + expert)

    def victim(self, key: int) -> int | None:
        """Whom a reservation should evict: -1 for nobody, None if there is no room."""
        slot_class = SLOT_CLASS[key // N_EXPERT]
        if len(self.held(slot_class)) < self.n_slot[slot_class]:
            return -1
        victim = self.policy(key).victim(self.pinned)
        if victim is not None:
            del self.resident[victim]
        return victim


layer_steps = st.tuples(
    st.just("begin"),
    st.integers(0, len(SLOT_CLASS) - 1),
    st.lists(st.integers(-1, N_EXPERT - 1), max_size=4),
)
operations = st.one_of(
    layer_steps,
    st.tuples(st.sampled_from(["end", "any"])),
    st.tuples(st.sampled_from(["reserve", "reserve", "complete", "cancel", "release", "touch"]), st.sampled_from(KEYS)),
)


@given(n_slot=st.tuples(st.integers(0, 4), st.integers(1, 6)), steps=st.lists(operations, max_size=80))
def test_any_operations(n_slot: tuple[int, int], steps: list[tuple[str, int, list[int]]]) -> None:
    cache, model = SlotCache(N_EXPERT, SLOT_CLASS, list(n_slot)), Model(list(n_slot))
    for name, *arguments in steps:
        apply(cache, model, name, arguments)
        cache.check_integrity()
        for key in KEYS:
            assert cache.resident(key) == (key in model.resident)
            assert cache.slot(key) == model.resident.get(key, model.in_flight.get(key, -1))
        for slot_class, n in enumerate(n_slot):
            n_flight = sum(SLOT_CLASS[key // N_EXPERT] == slot_class for key in model.in_flight)
            n_held = len(model.held(slot_class))
            assert cache.counts(slot_class) == (n - n_held, n_flight, n_held - n_flight)
        for layer in range(len(SLOT_CLASS)):
            expected = [(k % N_EXPERT, s) for k, s in sorted(model.resident.items()) if k // N_EXPERT == layer]
            assert cache.residents(layer) == expected


def apply(cache: SlotCache, model: Model, name: str, arguments: list[object]) -> None:
    if name == "begin":
        layer, experts = arguments
        assert isinstance(layer, int)
        assert isinstance(experts, list)
        cache.begin_layer_step(layer, experts)
        model.begin(layer, experts)
    elif name == "end":
        cache.end_layer_step()
        model.pinned = set()
    elif name == "any":  # what is in flight arrives, oldest first
        for arrived, slot in model.in_flight.items():
            cache.complete(arrived)
            model.resident[arrived] = slot
            model.policy(arrived).insert(arrived)
        model.in_flight.clear()
    else:
        (key,) = arguments
        assert isinstance(key, int)
        absent = key not in model.resident and key not in model.in_flight
        if name == "reserve" and absent:
            expected = model.victim(key)
            slot, evicted = cache.reserve(key)
            if expected is None:
                assert (slot, evicted) == (-1, -1)
            else:
                assert evicted == expected
                assert slot not in {s for k, s in (model.in_flight | model.resident).items() if same_class(k, key)}
                model.in_flight[key] = slot
        elif name == "complete" and key in model.in_flight:
            cache.complete(key)
            model.resident[key] = model.in_flight.pop(key)
            model.policy(key).insert(key)
        elif name == "cancel" and key in model.in_flight:
            cache.cancel(key)
            del model.in_flight[key]
        elif name == "release" and key in model.resident:
            cache.release(key)
            del model.resident[key]
            model.policy(key).victim(set(KEYS) - {key})
            # The plain policy counts the keys it passed as used now, in their order, which keeps the order.
        elif name == "touch" and key in model.resident:
            cache.touch(key)
            model.policy(key).touch(key)
        else:
            with pytest.raises(RuntimeError, match=f"expert {key % N_EXPERT} of layer {key // N_EXPERT}"):
                getattr(cache, name)(key)


def same_class(a: int, b: int) -> bool:
    return SLOT_CLASS[a // N_EXPERT] == SLOT_CLASS[b // N_EXPERT]


def test_experts_of_the_running_layer_step_are_never_victims() -> None:
    cache = SlotCache(4, [0, 0], [2])
    for expert in (0, 1):
        cache.reserve(cache.key(0, expert))
        cache.complete(cache.key(0, expert))
    cache.begin_layer_step(0, [1, 0])
    assert cache.reserve(cache.key(0, 2)) == (-1, -1)
    cache.end_layer_step()
    assert cache.reserve(cache.key(0, 2)) == (1, cache.key(0, 1))  # 0 was touched after 1
    assert cache.reserve(cache.key(1, 3)) == (0, cache.key(0, 0))
    assert cache.reserve(cache.key(1, 0)) == (-1, -1)  # what is in flight stays
    cache.check_integrity()


def test_kept_experts_stay_until_the_end_of_the_layer_step() -> None:
    cache = SlotCache(4, [0, 0], [2])
    for expert in (0, 1):
        cache.reserve(cache.key(0, expert))
        cache.complete(cache.key(0, expert))
    cache.begin_layer_step(1, [3])
    cache.keep(cache.key(0, 0))  # the oldest
    assert cache.reserve(cache.key(1, 3))[1] == cache.key(0, 1)
    assert cache.reserve(cache.key(1, 2)) == (-1, -1)
    cache.end_layer_step()
    assert cache.reserve(cache.key(1, 2))[1] == cache.key(0, 0)
    cache.check_integrity()


def test_impossible_arguments() -> None:
    cache = SlotCache(4, [0, 0], [2])
    for layer, expert in ((2, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(RuntimeError, match=f"no expert {expert} of layer {layer}"):
            cache.key(layer, expert)
    with pytest.raises(RuntimeError, match="class"):
        SlotCache(4, [0, 1], [2])
