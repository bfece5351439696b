"""Whether a missed key is worth evicting another one for."""

from moe_engine.policies.base import Admission, Key, Policy
from moe_engine.policies.decayed_sum import DecayedSum


class Always(Admission[Key]):
    """Admits every miss."""

    def admits(self, key: Key, victim: Key) -> bool:
        return True


class SecondTouch(Admission[Key]):
    """Admits a key that was used in the last `window` tokens before: keys used once leave the cache alone."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._last: dict[Key, tuple[int, int | None]] = {}  # this use, the one before

    def note(self, key: Key, step: int) -> None:
        before = self._last.get(key)
        self._last[key] = (step, before[0] if before else None)

    def admits(self, key: Key, victim: Key) -> bool:
        step, before = self._last.get(key, (0, None))
        return before is not None and step - before <= self._window


class BetterThanVictim(Admission[Key]):
    """Admits a key with more uses than the victim has, where a use counts half after `half_life` tokens.

    Counts of its own make it go with any policy, as in TinyLFU (Einziger, Friedman, Manes 2017).
    """

    def __init__(self, half_life: float) -> None:
        self._uses = DecayedSum[Key](half_life)

    def note(self, key: Key, step: int) -> None:
        self._uses.add(key, step)

    def admits(self, key: Key, victim: Key) -> bool:
        return self._uses.order(key) > self._uses.order(victim)


class Outranks(Admission[Key]):
    """Admits what the policy, too, would rather keep than the victim."""

    def __init__(self, policy: Policy[Key]) -> None:
        self._policy = policy

    def admits(self, key: Key, victim: Key) -> bool:
        return self._policy.prefers(key, victim)
