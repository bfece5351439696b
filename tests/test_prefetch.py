"""When the engine prefetches into slots."""

import pytest

from moe_engine.prefetch import PERIOD, TRIAL, WINDOW, PrefetchSwitch


def run(switch: PrefetchSwitch, first: int, last: int, ns: tuple[int, int], restart_every: int = 10**9) -> int:
    """Steps first to last, each of which takes as long as it is; returns how many prefetch."""
    counts, n_with = [[0, 0], [0, 0]], 0
    for step in range(first, last + 1):
        way = switch.wants(step)
        n_with += way
        counts[way][0] += 1
        counts[way][1] += ns[way]
        timed = ((counts[0][0], counts[0][1]), (counts[1][0], counts[1][1]))
        if switch.is_due(step):
            switch.note(timed)
            switch.turn(step)
        if step % restart_every == 0:
            switch.note(timed, starts_again=True)
            counts = [[0, 0], [0, 0]]
    return n_with


@pytest.mark.parametrize(("mode", "share"), [("off", 0), ("always", 1)])
def test_what_is_set_is_done(mode: str, share: int) -> None:
    assert run(PrefetchSwitch(mode), 1, 5000, (10, 10)) == 5000 * share  # type: ignore[arg-type]


@pytest.mark.parametrize("restart_every", [10**9, 37])
@pytest.mark.parametrize(("ns", "pays"), [((100, 99), True), ((99, 100), False), ((100, 100), False)])
def test_auto_does_what_was_faster(ns: tuple[int, int], pays: bool, restart_every: int) -> None:
    switch = PrefetchSwitch("auto")
    assert run(switch, 1, TRIAL, ns, restart_every) == TRIAL // 2
    assert run(switch, TRIAL + 1, PERIOD - 1, ns, restart_every) == (PERIOD - 1 - TRIAL) * pays
    other = (ns[1], ns[0])
    assert run(switch, PERIOD, PERIOD + TRIAL, other, restart_every) in (TRIAL // 2, TRIAL // 2 + pays)
    assert switch.pays == (other[1] < other[0])


def test_a_trial_alternates() -> None:
    switch = PrefetchSwitch("auto")
    ways = [switch.wants(step) for step in range(PERIOD, PERIOD + 4 * WINDOW)]
    assert ways == ([False] * WINDOW + [True] * WINDOW) * 2
