"""Runs contenders in turns and makes a result row of each test. ours.py is the engine, peers.py other programs."""

from collections.abc import Callable, Sequence
from typing import Protocol

from moe_engine.benchmark.plan import Test, snake
from moe_engine.benchmark.results import Row, Sample, timing


class Contender(Protocol):
    """Something whose speed is measured. Between `open` and `close` it holds the machine's memory."""

    name: str

    def open(self, tests: Sequence[Test]) -> None:
        """Loads, and warms up."""
        ...

    def run(self, test: Test, repetition: int) -> Sample: ...

    def close(self) -> None: ...

    def row(self, test: Test, samples: Sequence[Sample]) -> Row:
        """What is to be said beside the times. The contender has been closed."""
        ...


def run(
    contenders: Sequence[Contender],
    tests: Sequence[Test],
    repetitions: int,
    progress: Callable[[str], None] = lambda done: None,
) -> list[Row]:
    """A row for each contender and test. progress: called with what was just measured.

    Ctrl-C ends with the rows of what has been measured so far, if that is anything.
    """
    samples: dict[tuple[int, Test], list[Sample]] = {}
    held: Contender | None = None
    try:
        for repetition, (index, contender) in snake(list(enumerate(contenders)), repetitions):
            if contender is not held:
                if held is not None:
                    held.close()
                held = contender
                contender.open(tests)
            for test in reversed(tests) if repetition % 2 else tests:
                samples.setdefault((index, test), []).append(contender.run(test, repetition))
                progress(f"{contender.name} {test.name}")
    except KeyboardInterrupt:
        if not samples:
            raise
    finally:
        if held is not None:
            held.close()
    rows = []
    for index, contender in enumerate(contenders):
        for test in tests:
            if found := samples.get((index, test)):
                rows.append({**contender.row(test, found), **timing(test, found)})
    return rows
