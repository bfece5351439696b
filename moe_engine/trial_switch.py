"""Whether decode steps do what may or may not pay: off, on, or whatever is found to be faster."""

from moe_engine.config import PrefetchMode

Timed = tuple[tuple[int, int], tuple[int, int]]
"""Steps and their nanoseconds in all, without and with it."""

# Of every PERIOD steps TRIAL alternate between windows without and with; the rest do what was faster then.
PERIOD, TRIAL, WINDOW = 2048, 128, 16
WORTH = 0.98  # of the time without it, that steps with it must stay below: smaller gains may be the machine's


class TrialSwitch:
    """What the next steps should do. Both ways are compared again and again, for text and cache change."""

    def __init__(self, mode: PrefetchMode, first: int = 0, pays: bool = False) -> None:
        """first: the step at which trials begin. pays: what is taken for granted before."""
        self.mode, self.first = mode, first
        self.pays = pays  # as the last trial has found
        self._trial = [[0, 0], [0, 0]]
        self._before: Timed = (0, 0), (0, 0)

    def wants(self, step: int) -> bool:
        """Whether a step is to do it."""
        if self.mode != "auto":
            return self.mode == "always"
        place = (step - self.first) % PERIOD
        return self.pays if place >= TRIAL else place // WINDOW % 2 == 1

    def is_due(self, step: int) -> bool:
        """Whether a trial begins or ends with this step: then `note` and `turn` are."""
        return self.mode == "auto" and (step - self.first) % PERIOD in (0, TRIAL)

    def note(self, timed: Timed, starts_again: bool = False) -> None:
        """timed: counted since the start, or the last call that said that the counts start again."""
        for total, now, before in zip(self._trial, timed, self._before, strict=True):
            total[0] += now[0] - before[0]
            total[1] += now[1] - before[1]
        self._before = ((0, 0), (0, 0)) if starts_again else timed

    def turn(self, step: int) -> None:
        """A trial begins or ends."""
        (n_without, without), (n_with, with_) = self._trial
        if (step - self.first) % PERIOD == TRIAL and n_without and n_with:
            self.pays = with_ / n_with < WORTH * without / n_without
        self._trial = [[0, 0], [0, 0]]
