"""A whole benchmark: contenders, their turns, and complete rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_engine.benchmark.environment import ModelFacts
from moe_engine.benchmark.machine import Machine
from moe_engine.benchmark.ours import Ours
from moe_engine.benchmark.plan import Load, Test
from moe_engine.benchmark.results import Row, add_ratios
from moe_engine.benchmark.runner import Contender, run
from moe_engine.config import EngineConfig
from moe_engine.errors import ConfigError


@dataclass(frozen=True)
class Session:
    """What to measure. against: `"llama-bench=PATH"`, `"ik=PATH"`, `"accelerate"`. arguments: the command line, to be
    kept in the rows."""

    path: Path
    loads: Sequence[Load]
    tests: Sequence[Test]
    repetitions: int = 3
    routing: Path | None = None
    against: Sequence[str] = ()
    with_timeline: bool = False
    arguments: Sequence[str] = field(default_factory=tuple)

    def run(self, progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> list[Row]:
        """progress: called with runs done, runs in all, and the last one's name. Raises what `Engine.load` does,
        `ConfigError` for a peer. Ctrl-C: the rows of what has been measured, if anything."""
        facts, first = ModelFacts.of(self.path), dict(self.loads[0].options)
        machine = Machine(EngineConfig.of(device=first.get("device", "auto"), threads=first.get("threads")))
        ours = [
            Ours(self.path, facts, load, machine, routing=self.routing, with_timeline=self.with_timeline)
            for load in self.loads
        ]
        contenders, done = with_peers(ours, self.against), 0
        total = len(contenders) * len(self.tests) * self.repetitions
        progress(0, total, "")

        def step(what: str) -> None:
            nonlocal done
            done += 1
            progress(done, total, what)

        rows = run(contenders, self.tests, self.repetitions, step)
        environment = machine.environment(self.arguments).as_dict()
        add_ratios(rows)
        for row in rows:
            row.setdefault("build_commit", environment["commit"])
            row |= {"cpu_info": environment["cpu"], "gpu_info": environment["gpu"], "environment": environment}
        return rows


def with_peers(ours: Sequence[Ours], against: Sequence[str]) -> list[Contender]:
    """Each of ours, and behind it those that it is compared with. Raises `ConfigError`."""
    peers: list[tuple[Ours, Contender]] = []
    for text in against:
        name, _, path = text.partition("=")
        if name == "accelerate" and not path:
            from moe_engine.benchmark.accelerate_peer import Accelerate

            peers += [(one, Accelerate(one)) for one in ours]
        elif name in ("llama-bench", "ik") and path:
            from moe_engine.benchmark.peers import llama_benches

            peers += [(peer.ours, peer) for peer in llama_benches(name, Path(path), ours)]
        else:
            raise ConfigError(f"--against is {text!r}, expected llama-bench=PATH, ik=PATH or accelerate")
    return [contender for one in ours for contender in (one, *(peer for owner, peer in peers if owner is one))]
