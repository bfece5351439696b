"""Replacement policies against a plain model of what they should do."""

from hypothesis import given
from hypothesis import strategies as st

from moe_engine.policies.lru import LRU


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
                passed = order[: order.index(victim)] if victim is not None else list(order)
                if victim is None:
                    continue
                order = [k for k in order if k not in passed and k != victim] + passed
            policy.insert(key)
            order.append(key)
        assert len(policy) == len(order)
        assert all(k in policy for k in order)


def test_lru_of_pinned_keys_has_no_victim_and_keeps_them() -> None:
    policy = LRU[str](2)
    policy.insert("a")
    policy.insert("b")
    assert policy.victim({"a", "b"}) is None
    assert "a" in policy
    assert "b" in policy
    assert policy.victim(()) == "a"
