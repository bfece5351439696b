"""Replacement policies: a contract for all, and what each of them promises against a plain model of it."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.errors import ConfigError
from moe_engine.policies.admission import BetterThanVictim, Outranks, SecondTouch
from moe_engine.policies.least_stale import LeastStale
from moe_engine.policies.lfu import LFU
from moe_engine.policies.lfu_decay import DecayedLFU
from moe_engine.policies.lru import LRU
from moe_engine.policies.pinned_lru import PinnedLRU
from moe_engine.policies.registry import Pool, policy_names, policy_of

N_LAYER, N_EXPERT = 2, 5
KEYS = st.integers(0, N_LAYER * N_EXPERT - 1)


@pytest.mark.parametrize("name", [*policy_names(), "lru:floor=1", "pinned-lru:floor=2"])
@settings(max_examples=40)
@given(
    capacity=st.integers(1, 6),
    uses=st.lists(st.tuples(KEYS, st.floats(0, 2), st.sets(KEYS, max_size=4), st.booleans()), max_size=60),
)
def test_contract(name: str, capacity: int, uses: list[tuple[int, float, set[int], bool]]) -> None:
    future: dict[int, list[int]] = {}
    for step, (key, _, _, _) in enumerate(uses):
        future.setdefault(key, []).append(step)
    pool = Pool(capacity, N_LAYER, N_EXPERT, future, profile={0: 9, 7: 3, 1: 1})
    policy, admission = policy_of(name).build(pool)
    resident: set[int] = set()
    for step, (key, weight, pinned, peek) in enumerate(uses):
        policy.touch(key, step, weight)
        admission.note(key, step)
        if key in resident:
            if peek:
                policy.remove(key)
                resident.remove(key)
        else:
            if len(resident) == capacity:
                victim = policy.candidate(pinned) if peek else policy.victim(pinned)
                assert victim is None or victim in resident - pinned or (name == "belady-bypass" and victim in resident)
                if peek:
                    assert {k for k in range(10) if k in policy} == resident, "only looked"
                    if victim is not None and not admission.admits(key, victim):
                        continue
                if victim is None:
                    assert name.startswith("pinned-lru") or resident <= pinned
                    continue
                if peek:
                    policy.remove(victim)
                resident.remove(victim)
            policy.insert(key)
            resident.add(key)
        assert len(policy) == len(resident) <= capacity
        assert {k for k in range(10) if k in policy} == resident


@given(
    capacity=st.integers(1, 6),
    uses=st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 9), max_size=3)), max_size=60),
)
def test_lru_evicts_the_longest_unused_key_that_is_not_pinned(capacity: int, uses: list[tuple[int, set[int]]]) -> None:
    policy, order = LRU[int](capacity), list[int]()  # order: oldest first
    for key, pinned in uses:
        if key in order:
            policy.touch(key)
            order.remove(key)
            order.append(key)
        else:
            if len(order) == capacity:
                victim = policy.victim(pinned)
                free = [k for k in order if k not in pinned]
                assert victim == (free[0] if free else None)
                if victim is None:
                    continue
                order.remove(victim)
            policy.insert(key)
            order.append(key)
        assert len(policy) == len(order)
        assert all(k in policy for k in order)


@given(
    capacity=st.integers(1, 6),
    uses=st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 9), max_size=3), st.booleans()), max_size=60),
)
def test_lfu_counts_all_uses_and_breaks_ties_by_the_last(capacity: int, uses: list[tuple[int, set[int], bool]]) -> None:
    policy, order, counts = LFU[int](capacity), list[int](), Counter[int]()  # order: oldest use first
    for key, pinned, admitted in uses:
        policy.touch(key)
        counts[key] += 1
        if key in order:
            order.remove(key)
        elif not admitted:  # used, but not loaded
            continue
        elif len(order) == capacity:
            victim = policy.victim(pinned)
            assert victim == min((k for k in order if k not in pinned), key=lambda k: counts[k], default=None)
            if victim is None:
                continue
            order.remove(victim)
            policy.insert(key)
        else:
            policy.insert(key)
        order.append(key)
        assert all(policy.prefers(key, other) == (counts[key] > counts[other]) for other in order)


def test_lru_of_pinned_keys_has_no_victim_and_keeps_them() -> None:
    policy = LRU[str](2)
    policy.insert("a")
    policy.insert("b")
    assert policy.victim({"a", "b"}) is None
    assert "a" in policy
    assert "b" in policy
    assert policy.victim(()) == "a"


def test_lru_keeps_a_candidate_that_is_used_after_all() -> None:
    policy = LRU[str](2)
    policy.insert("a")
    policy.insert("b")
    assert policy.candidate(()) == "a"
    policy.touch("a")
    assert policy.victim(()) == "b"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=40))
def test_decayed_counts_order_keys_as_the_sums_do(uses: list[tuple[int, int]]) -> None:
    policy = DecayedLFU[int](5, half_life=4)
    for key in range(5):
        policy.insert(key)
    step, sums = 0, Counter[int]()
    for key, pause in uses:
        step += pause
        policy.touch(key, step)
        sums = Counter({k: v * 2 ** (-pause / 4) for k, v in sums.items()})
        sums[key] += 1
    victim = policy.victim(())
    assert victim is not None
    assert math.isclose(sums[victim], min(sums[k] for k in range(5)), rel_tol=1e-9, abs_tol=1e-300)


def test_class_lru_ignores_small_differences() -> None:
    policy, _ = policy_of("class-lru:half_life=1e9").build(Pool(3, 1, 3))
    for key in (2, 2, 2, 0, 0, 1):  # two keys of class 1, one of class 0
        if key not in policy:
            policy.insert(key)
        policy.touch(key)
    assert [policy.victim(()) for _ in range(3)] == [1, 2, 0], "LFU would let 0 go before 2"


def test_least_stale_spares_what_the_next_layer_used_one_token_ago() -> None:
    policy = LeastStale(4, n_layer=2, n_expert=10)
    for key, token in ((0, 0), (10, 0), (1, 1)):
        policy.touch(key, token)
        policy.insert(key)
    assert policy.candidate(()) == 0, "layer 0 has had its turn without it"
    policy.touch(0, 1)
    assert policy.candidate({1}) == 0, "layer 1 comes next, then layer 0"


def test_pinned_lru_keeps_the_hot_keys() -> None:
    policy = PinnedLRU[str](2, hot={"a"})
    policy.insert("a")
    policy.insert("b")
    assert policy.victim(()) == "b"
    assert policy.victim(()) is None


def test_router_weight_evicts_the_smallest_sum() -> None:
    policy, _ = policy_of("router-weight").build(Pool(2, 1, 2))
    for key, weight in ((0, 0.9), (1, 0.2), (1, 0.2)):
        policy.touch(key, 0, weight)
    policy.insert(0)
    policy.insert(1)
    assert policy.victim(()) == 1


def test_second_touch_admits_within_the_window() -> None:
    rule = SecondTouch[int](window=3)
    found = []
    for key, step in ((0, 0), (0, 3), (1, 3), (0, 7)):
        rule.note(key, step)
        found.append(rule.admits(key, 9))
    assert found == [False, True, False, False]


def test_better_than_victim_counts_uses() -> None:
    rule = BetterThanVictim[int](half_life=10)
    for key, step in ((0, 0), (1, 0), (0, 1)):
        rule.note(key, step)
    assert rule.admits(0, victim=1)
    assert not rule.admits(1, victim=0)
    assert not rule.admits(0, victim=0)


def test_outranks_asks_the_policy() -> None:
    policy = DecayedLFU[int](2, half_life=10)
    rule = Outranks(policy)
    for key, step in ((0, 0), (0, 1), (1, 2)):
        policy.touch(key, step)
    assert rule.admits(0, victim=1)
    assert not rule.admits(1, victim=0)
    assert Outranks(LRU[int](2)).admits(1, victim=0), "what was just used is the most recently used"


def test_blend_prefers_what_was_just_used_to_what_is_used_as_often() -> None:
    policy, _ = policy_of("blend:half_life=100,fast=1,share=0.2").build(Pool(3, 2, 10))
    for step in range(40):
        policy.touch(0, step)  # layer 0 has two experts in turns, of which 1 is the one just used
        policy.touch(1, step) if step % 2 else policy.touch(2, step)
    for key in (0, 1, 2):
        policy.insert(key)
    assert [policy.victim(()) for _ in range(3)] == [2, 1, 0]


def test_blend_prefers_only_what_is_used_so_many_times_as_often() -> None:
    for margin, preferred in ((1, True), (1.4, True), (1.6, False)):
        policy, rule = policy_of(f"blend:half_life=1e6,share=0,margin={margin},admit=outranks").build(Pool(2, 1, 10))
        for step in range(30):
            policy.touch(0 if step % 5 < 2 else 1, step)  # 12 and 18 times: 1.5 times as often
        assert rule.admits(1, victim=0) is preferred
        assert not rule.admits(0, victim=1)


def test_blend_counts_age_in_turns_of_the_own_layer() -> None:
    policy, _ = policy_of("blend:half_life=10,fast=1,share=0.1").build(Pool(3, 2, 10))
    for key, step in ((0, 0), (10, 0), (1, 1), (2, 2), (3, 3)):
        policy.touch(key, step)
    policy.insert(0)
    policy.insert(10)
    assert policy.candidate(()) == 0, "layer 1 has had no turn without expert 0"


def test_specification() -> None:
    spec = policy_of("lfu-decay:half_life=8,admit=second-touch,window=5")
    assert (spec.name, spec.admit, spec.values) == ("lfu-decay", "second-touch", {"half_life": 8.0, "window": 5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mru", "unknown policy 'mru', expected one of: lru, lfu, "),
        ("lru:", None),
        ("lru:half_life=1", "unknown key 'half_life', expected one of: admit"),
        ("lfu-decay:half_life", "should be key=value"),
        ("lfu-decay:half_life=nan", "half_life is 'nan', expected a number from 0.01"),
        ("random:seed=1.5", "seed is '1.5', expected an integer"),
        ("random:seed=1,seed=2", "'seed' is given twice"),
        ("lru:floor=-1", "floor is '-1', expected an integer from 0"),
        ("lru:admit=never", "unknown admit=never, expected one of: always, second-touch"),
        ("belady-bypass:admit=always", "unknown key 'admit', expected one of: none"),
    ],
)
def test_wrong_specifications_say_what_is_known(text: str, message: str | None) -> None:
    if message is None:
        assert policy_of(text).name == "lru"
        return
    with pytest.raises(ConfigError) as error:
        policy_of(text)
    assert message in str(error.value)


def test_a_layer_keeps_its_floor_while_others_have_more() -> None:
    policy, _ = policy_of("lru:floor=1").build(Pool(4, N_LAYER, N_EXPERT))
    for key in (0, 5, 6, 7):  # layer 0 has one key, the oldest
        policy.touch(key)
        policy.insert(key)
    assert policy.candidate(()) == 5
    assert policy.candidate({5, 6, 7}) == 0, "there is nothing else"
    policy.touch(0)
    assert policy.candidate({5, 6, 7}) == 0, "a layer may evict its own"
    assert policy_of("lru").floor == 0


def test_what_a_policy_must_know_is_asked_for() -> None:
    for name, message in (("pinned-lru", "needs a profile"), ("belady", "only be simulated")):
        with pytest.raises(ConfigError, match=message):
            policy_of(name).build(Pool(2, 1, 4))
