"""Belady's optimum: knows the future, so it is a bound and not a policy to run."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from moe_engine.policies.base import Admission, Key
from moe_engine.policies.ranked import Ranked


class Belady(Ranked[Key]):
    """Evicts the key that is needed latest (Belady 1966). No policy that inserts every miss has more hits.

    `uses[key]` are the times of all uses of a key that will be touched, ascending, in any unit.
    """

    def __init__(self, capacity: int, uses: Mapping[Key, Sequence[int]]) -> None:
        self._uses = uses
        self._done: Counter[Key] = Counter()
        self._sooner = defaultdict[Key, float](lambda: -math.inf)  # minus the time of the next use
        self._sooner.update((key, -times[0]) for key, times in uses.items() if times)
        super().__init__(capacity, rank=self._sooner.__getitem__)

    def note(self, key: Key, step: int, weight: float) -> None:
        self._done[key] += 1
        self._sooner[key] = -self.next_use(key)

    def next_use(self, key: Key) -> float:
        """When `key` is used next; infinity if never."""
        times, n = self._uses.get(key, ()), self._done[key]
        return times[n] if n < len(times) else math.inf


class BeladyBypass(Belady[Key]):
    """With `SoonerThanVictim`: the bound of everything, for a miss may be left out and pinned keys may be evicted.

    Were it to keep the pinned ones, the key needed latest would not always be the best victim.
    """

    def candidate(self, pinned: Collection[Key]) -> Key | None:
        return super().candidate(())


class SoonerThanVictim(Admission[Key]):
    """Admits what is needed before the victim is."""

    def __init__(self, belady: Belady[Key]) -> None:
        self._belady = belady

    def order(self, keys: Sequence[Key]) -> Sequence[Key]:
        # Hits first: a key is a victim only from its use on.
        return sorted(keys, key=lambda key: key not in self._belady)

    def admits(self, key: Key, victim: Key) -> bool:
        return self._belady.next_use(key) < self._belady.next_use(victim)
