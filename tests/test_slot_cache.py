"""The native slot cache against a plain model whose victims are chosen by the classes of `policies`."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.config import EngineConfig
from moe_engine.errors import ConfigError
from moe_engine.kernels._cpu import SlotCache
from moe_engine.kernels.policy import native_policy
from moe_engine.policies.base import Admission, Policy
from moe_engine.policies.registry import NATIVE, PolicySpec, Pool, policy_names, policy_of

LRU = native_policy(policy_of("lru"))
N_EXPERT, SLOT_CLASS = 5, [0, 1, 0, 1]
KEYS = range(N_EXPERT * len(SLOT_CLASS))


SETTINGS = {
    "half_life=0.7": {"lfu-decay", "class-lru", "blend"},
    "half_life=20": {"lfu-decay", "class-lru"},
    "half_life=5,fast=0.3,share=0.5": {"blend"},
}
RULES = ["always", "second-touch,window=3", "better-than-victim,admit_half_life=2", "outranks"]
SPECS = [f"{name}:admit={rule}" for name in NATIVE for rule in RULES]
SPECS += [f"{name}:{settings},admit=outranks" for settings, names in SETTINGS.items() for name in sorted(names)]
SPECS += [f"{name}:floor={floor},admit=outranks" for name in NATIVE for floor in (1, 2)]


@dataclass
class Model:
    """What should be where."""

    n_slot: list[int]
    spec: PolicySpec
    in_flight: dict[int, int] = field(default_factory=dict)  # slot by key
    resident: dict[int, int] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    used: list[int] = field(default_factory=list)
    step: int = 1
    uses: dict[int, list[int]] = field(default_factory=dict)  # steps, by key
    turn: dict[int, int] = field(default_factory=dict)  # the last step, by layer

    def __post_init__(self) -> None:
        pools = [Pool(max(1, n), len(SLOT_CLASS), N_EXPERT) for n in self.n_slot]
        self.built = [self.spec.build(pool) for pool in pools]

    def policy(self, key: int) -> Policy[int]:
        return self.built[SLOT_CLASS[key // N_EXPERT]][0]

    def admission(self, key: int) -> Admission[int]:
        return self.built[SLOT_CLASS[key // N_EXPERT]][1]

    def held(self, slot_class: int) -> list[int]:
        return [k for k in (*self.in_flight, *self.resident) if SLOT_CLASS[k // N_EXPERT] == slot_class]

    def begin(self, layer: int, experts: list[int]) -> None:
        self.end()
        self.used = [layer * N_EXPERT + expert for expert in experts if expert >= 0]
        self.pinned = set(self.used)
        for key in self.used:
            self.uses.setdefault(key, []).append(self.step)
            self.turn[layer] = self.step
            self.policy(key).touch(key, self.step)
            self.admission(key).note(key, self.step)

    def end(self) -> None:
        """What was used stands in the order of its uses, as if a copy took no time."""
        for key in self.used:
            if key in self.resident:
                self.policy(key).remove(key)
                self.policy(key).insert(key)
        self.used, self.pinned = [], set()

    def more_uses(self, key: int, victim: int) -> float:
        if "half_life" not in self.spec.values:
            return math.inf
        key_uses, victim_uses = (
            sum(2 ** ((step - self.turn[of // N_EXPERT]) / self.spec.values["half_life"]) for step in self.uses[of])
            if of in self.uses
            else 0.0
            for of in (key, victim)
        )
        return key_uses - victim_uses

    def victim(self, key: int, evict: str, least: float = -math.inf) -> int | None:
        """Whom a reservation should evict: -1 for nobody, None if there is no room."""
        slot_class = SLOT_CLASS[key // N_EXPERT]
        if len(self.held(slot_class)) < self.n_slot[slot_class]:
            return -1
        victim = self.policy(key).candidate(self.pinned) if evict != "nobody" else None
        if victim is None:
            return None
        admitted = self.admission(key).admits(key, victim) and self.more_uses(key, victim) >= least
        if evict == "worse" and not admitted:
            return None
        self.policy(key).remove(victim)
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
    st.tuples(st.just("pause"), st.integers(1, 700)),
    st.tuples(st.just("reserve"), st.sampled_from(KEYS), st.sampled_from(["any", "worse", "worse", "nobody"])),
    st.tuples(st.just("reserve"), st.sampled_from(KEYS), st.just("worse"), st.sampled_from([-0.3, 0.37, 0.91])),
    st.tuples(st.sampled_from(["complete", "cancel", "release", "keep"]), st.sampled_from(KEYS)),
)


@settings(max_examples=200)
@given(
    spec=st.sampled_from(SPECS),
    n_slot=st.tuples(st.integers(0, 4), st.integers(1, 6)),
    steps=st.lists(operations, max_size=60),
)
def test_any_operations(spec: str, n_slot: tuple[int, int], steps: list[tuple[Any, ...]]) -> None:
    policy = policy_of(spec)
    cache = SlotCache(N_EXPERT, SLOT_CLASS, list(n_slot), native_policy(policy))
    model = Model(list(n_slot), policy)
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


def apply(cache: SlotCache, model: Model, name: str, arguments: list[Any]) -> None:
    if name == "pause":
        model.step += arguments[0]
    elif name == "begin":
        layer, experts = arguments
        cache.begin_layer_step(layer, experts, model.step)
        model.begin(layer, experts)
    elif name == "end":
        cache.end_layer_step()
        model.end()
    elif name == "keep":
        cache.keep(arguments[0])
        model.pinned.add(arguments[0])
    elif name == "any":  # what is in flight arrives, oldest first
        for arrived, slot in model.in_flight.items():
            cache.complete(arrived)
            model.resident[arrived] = slot
            model.policy(arrived).insert(arrived)
        model.in_flight.clear()
    else:
        key, *evict = arguments
        absent = key not in model.resident and key not in model.in_flight
        if name == "reserve" and absent:
            expected = model.victim(key, *evict)
            slot, evicted = cache.reserve(key, *evict)
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
            model.policy(key).remove(key)
        else:
            with pytest.raises(RuntimeError, match=f"expert {key % N_EXPERT} of layer {key // N_EXPERT}"):
                getattr(cache, name)(key)


def same_class(a: int, b: int) -> bool:
    return SLOT_CLASS[a // N_EXPERT] == SLOT_CLASS[b // N_EXPERT]


def test_experts_of_the_running_layer_step_are_never_victims() -> None:
    cache = SlotCache(4, [0, 0], [2], LRU)
    for expert in (0, 1):
        cache.reserve(cache.key(0, expert))
        cache.complete(cache.key(0, expert))
    cache.begin_layer_step(0, [1, 0], 1)
    assert cache.reserve(cache.key(0, 2)) == (-1, -1)
    cache.end_layer_step()
    assert cache.reserve(cache.key(0, 2)) == (1, cache.key(0, 1))  # 0 was touched after 1
    assert cache.reserve(cache.key(1, 3)) == (0, cache.key(0, 0))
    assert cache.reserve(cache.key(1, 0)) == (-1, -1)  # what is in flight stays
    cache.check_integrity()


def test_kept_experts_stay_until_the_end_of_the_layer_step() -> None:
    cache = SlotCache(4, [0, 0], [2], LRU)
    for expert in (0, 1):
        cache.reserve(cache.key(0, expert))
        cache.complete(cache.key(0, expert))
    cache.begin_layer_step(1, [3], 1)
    cache.keep(cache.key(0, 0))  # the oldest
    assert cache.reserve(cache.key(1, 3))[1] == cache.key(0, 1)
    assert cache.reserve(cache.key(1, 2)) == (-1, -1)
    cache.end_layer_step()
    assert cache.reserve(cache.key(1, 2))[1] == cache.key(0, 0)
    cache.check_integrity()


def test_impossible_arguments() -> None:
    cache = SlotCache(4, [0, 0], [2], LRU)
    for layer, expert in ((2, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(RuntimeError, match=f"no expert {expert} of layer {layer}"):
            cache.key(layer, expert)
    with pytest.raises(RuntimeError, match="class"):
        SlotCache(4, [0, 1], [2], LRU)


def test_an_earlier_runs_uses_count() -> None:
    cache = SlotCache(4, [0], [2], native_policy(policy_of("lfu")))
    for expert in (0, 1):
        cache.reserve(cache.key(0, expert))
        cache.complete(cache.key(0, expert))
    cache.seed(cache.key(0, 0), 2.5)
    cache.begin_layer_step(0, [1], 1)
    cache.begin_layer_step(0, [1, 2], 2)
    cache.end_layer_step()
    assert cache.reserve(cache.key(0, 2), "nobody") == (-1, -1)
    assert cache.reserve(cache.key(0, 2)) == (1, cache.key(0, 1))


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=20)
@given(
    order=st.permutations(range(N_EXPERT)),
    uses=st.lists(st.integers(0, N_EXPERT - 1), max_size=6),
    arrives=st.lists(st.integers(0, 6), min_size=N_EXPERT, max_size=N_EXPERT),
    seeds=st.lists(st.sampled_from([0.0, 0.5, 0.5, 3.0]), min_size=N_EXPERT, max_size=N_EXPERT),
)
def test_what_is_filled_stands_as_if_it_had_come_before_the_first_step(
    spec: str, order: list[int], uses: list[int], arrives: list[int], seeds: list[float]
) -> None:
    """The best one last, whenever it has arrived: all are evicted in the same order."""
    caches = [SlotCache(N_EXPERT, [0, 0], [N_EXPERT], native_policy(policy_of(spec))) for _ in range(2)]
    early, late = caches
    for cache in caches:
        for expert, n_use in enumerate(seeds):
            if n_use > 0:
                cache.seed(expert, n_use)
    for expert in reversed(order):
        early.reserve(expert)
        early.complete(expert)
    for expert in order:
        late.reserve(expert)
    when = dict(zip(order, sorted(arrives), strict=True))  # copies end in their order
    for step in range(len(uses) + 1):
        for expert in order:
            if when[expert] == step:
                late.complete(expert, filled=True)
        if step < len(uses):
            for cache in caches:
                cache.begin_layer_step(0, [uses[step]], step + 1)
                cache.end_layer_step()
    for expert in order:
        if when[expert] > len(uses):
            late.complete(expert, filled=True)
    for cache in caches:
        cache.check_integrity()
    victims = [[cache.reserve(N_EXPERT + expert)[1] for expert in range(N_EXPERT)] for cache in caches]
    assert victims[0] == victims[1]
    assert sorted(victims[0]) == list(range(N_EXPERT))


def test_policies_without_a_twin_name_those_that_have_one() -> None:
    for name in set(policy_names()) - set(NATIVE):
        for refuse in (lambda name: native_policy(policy_of(name)), lambda name: EngineConfig(policy=name)):
            with pytest.raises(ConfigError, match=f"'{name}' has no native twin; those that have are lru, lfu"):
                refuse(name)
    with pytest.raises(ConfigError, match="unknown policy 'mru'"):
        EngineConfig(policy="mru")
