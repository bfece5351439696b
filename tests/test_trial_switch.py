"""When steps do what may pay."""

import pytest

from moe_engine.trial_switch import PERIOD, TRIAL, WINDOW, TrialSwitch


def run(switch: TrialSwitch, first: int, last: int, ns: tuple[int, int], restart_every: int = 10**9) -> int:
    """Steps first to last, each of which takes as long as it is; returns how many do it."""
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
    assert run(TrialSwitch(mode), 1, 5000, (10, 10)) == 5000 * share  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, TRIAL])
@pytest.mark.parametrize("restart_every", [10**9, 37])
@pytest.mark.parametrize(
    ("ns", "pays"), [((100, 97), True), ((97, 100), False), ((100, 99), False), ((100, 100), False)]
)
def test_auto_does_what_was_faster(ns: tuple[int, int], pays: bool, restart_every: int, first: int) -> None:
    switch = TrialSwitch("auto", first)
    assert run(switch, 1, first, ns, restart_every) == 0
    assert run(switch, first + 1, first + TRIAL, ns, restart_every) == TRIAL // 2
    assert run(switch, first + TRIAL + 1, first + PERIOD - 1, ns, restart_every) == (PERIOD - 1 - TRIAL) * pays
    other = (ns[1], ns[0])
    n_with = run(switch, first + PERIOD, first + PERIOD + TRIAL, other, restart_every)
    assert n_with in (TRIAL // 2, TRIAL // 2 + pays)
    assert switch.pays == (other[1] < 0.98 * other[0])


def test_what_is_taken_for_granted_is_done_until_a_trial_ends() -> None:
    switch = TrialSwitch("auto", first=2 * TRIAL, pays=True)
    assert run(switch, 1, 2 * TRIAL - 1, (100, 99)) == 2 * TRIAL - 1
    assert run(switch, 2 * TRIAL, PERIOD, (100, 99)) == TRIAL // 2 + 1  # the trial's last result comes a step later
    assert not switch.pays


def test_a_trial_alternates() -> None:
    switch = TrialSwitch("auto")
    ways = [switch.wants(step) for step in range(PERIOD, PERIOD + 4 * WINDOW)]
    assert ways == ([False] * WINDOW + [True] * WINDOW) * 2
