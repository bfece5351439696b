"""llama-bench, of llama.cpp or ik_llama.cpp, as a contender: the same file, threads, sizes and VRAM as one of ours.

Which layers' experts it keeps on the CPU is chosen so that its peak VRAM is the closest one not above ours. It runs
while our engine is not loaded, once in every repetition.
"""

import re
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from moe_engine.benchmark.environment import vram_in_use
from moe_engine.benchmark.ours import Ours
from moe_engine.benchmark.plan import Test
from moe_engine.benchmark.results import Row, Sample, test_of
from moe_engine.benchmark.tables import parse_rows
from moe_engine.errors import ConfigError, MoeEngineError
from moe_engine.gguf_file import GGUFFile
from moe_engine.placement import is_expert

Knob = Literal["ncmoe", "ot", "cache"]
"""How it keeps experts off the GPU: -ncmoe N, -ot PATTERN=CPU, or all on the CPU and --moe-cache-mib N."""

_MIB = 1 << 20
_TRIES = 8  # runs to find how many layers


class LlamaBench:
    """A llama-bench binary beside `ours`, which has been run before it. name: "llama-bench", "ik" or the like."""

    def __init__(self, name: str, binary: Path, ours: Ours, knob: Knob, options: frozenset[str]) -> None:
        """Use `llama_benches`."""
        self.binary, self.ours, self.knob, self.options = binary, ours, knob, options
        self.engine = name + (" with expert cache" if knob == "cache" else "")
        self.name = " ".join(part for part in (self.engine, ours.load.name) if part)
        self.peak_vram = 0
        self._setting: list[str] | None = None
        self._tests: Sequence[Test] = ()
        self._rows: dict[Test, Row] = {}  # of the repetition at hand
        self._repetition = -1

    def open(self, tests: Sequence[Test]) -> None:
        """Finds the setting once."""
        self._tests = tests
        if self._setting is None:
            self._setting = self._fit(tests) if self._on_gpu else []

    @property
    def _on_gpu(self) -> bool:
        return self.ours.machine.device.type == "cuda"

    def _fit(self, tests: Sequence[Test]) -> list[str]:
        largest = max(tests, key=lambda test: test.n_ctx)
        shortened = Test(largest.n_prompt, min(largest.n_gen, 1), largest.n_depth)

        def peak(setting: list[str]) -> int:
            with _PeakVram(self.ours.machine.gpu) as watch:
                self._call(setting, _selection([shortened]))
            peaks[tuple(setting)] = watch.peak
            return watch.peak

        peaks: dict[tuple[str, ...], int] = {}
        limit = self.ours.peak_vram
        if self.knob == "cache":
            setting = self._cache(fit_cache(lambda mib: peak(self._cache(mib)), limit))
        else:
            setting = self._off(fit_layers(lambda n: peak(self._off(n)), layer_bytes(self.ours.path), limit))
        self.peak_vram = peaks.get(tuple(setting), 0)
        return setting

    def _off(self, n_layer: int) -> list[str]:
        """Experts of the first `n_layer` layers on the CPU."""
        if self.knob == "ncmoe":
            return ["-ncmoe", str(n_layer)]
        numbers = "|".join(map(str, range(n_layer)))
        return ["-ot", rf"blk\.({numbers})\.ffn_(up|down|gate)_exps\.=CPU"] if n_layer else []

    def _cache(self, mib: int) -> list[str]:
        return ["-ncmoe", str(len(layer_bytes(self.ours.path))), "--moe-cache-mib", str(mib)]

    def _call(self, setting: Sequence[str], selection: Sequence[str]) -> list[Row]:
        config, gpu = self.ours.config, self._on_gpu
        # -ngl: more than any model has
        common = ["-m", self.ours.path, "-t", config.n_threads, "-ngl", 999 if gpu else 0, "-r", 1, "-o", "json"]
        common += ["-b", max(2048, self.ours.ubatch), "-ub", self.ours.ubatch]
        common += ["-ctk", config.kv_dtype, "-ctv", config.kv_dtype]
        common += ["-fa", 1] if gpu and "-fa" in self.options else []
        if any(part == "-d" for part in selection) and "-d" not in self.options:
            raise ConfigError(f"{self.binary}: knows no -d: measure at depth 0")
        command = [str(part) for part in (self.binary, *common, *setting, *selection)]
        done = _run(command)
        start = done.stdout.find("[")
        if done.returncode or start < 0:
            tail = (done.stderr or done.stdout).strip()[-400:]
            raise MoeEngineError(f"{self.binary} ended with status {done.returncode}: {tail}")
        return parse_rows(done.stdout[start:], f"output of {self.binary}")

    def run(self, test: Test, repetition: int) -> Sample:
        """The first call of a repetition runs all tests."""
        if repetition != self._repetition:
            self._rows = {test_of(row): row for row in self._call(self._setting or [], _selection(self._tests))}
            self._repetition = repetition
        if test not in self._rows or not self._rows[test]["avg_ts"]:
            raise MoeEngineError(f"{self.binary}: gave no result for {test.name}")
        return Sample(test.n_token / self._rows[test]["avg_ts"], test.n_token)

    def close(self) -> None:
        pass  # its process has ended

    def row(self, test: Test, samples: Sequence[Sample]) -> Row:
        facts = self.ours.facts
        return {
            **self._rows[test],
            "engine": self.engine,
            "model_filename": facts.model_filename,
            "model_type": facts.model_type,
            "model_fingerprint": facts.model_fingerprint,
            "n_sequence": 1,
            "routing": "own",
            "options": dict(self.ours.load.options),
            "varied": list(self.ours.load.varied),
            "knob": self._setting,
            "peak_vram": self.peak_vram or None,
        }


def llama_benches(name: str, binary: Path, ours: Sequence[Ours]) -> list[LlamaBench]:
    """A contender for each of ours, and one more each where the binary has an expert cache.

    Raises `ConfigError` if it is no such program, or ours do what it cannot.
    """
    for one in ours:
        if one.load["n_sequence"] not in (None, 1):
            raise ConfigError(f"--against {name}: llama-bench decodes one sequence, but n_sequence is varied: use 1")
        if one.routing is not None:
            raise ConfigError(f"--against {name}: llama-bench cannot follow recorded routing")
    done = _run([str(binary), "--help"])
    listed = re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout + done.stderr)
    options = frozenset(listed)
    if not {"--n-prompt", "--n-gen", "--output"} <= options:
        raise ConfigError(f"--against {name}={binary}: is no llama-bench: its --help lists no --n-prompt and --n-gen")
    if not {"-ncmoe", "--n-cpu-moe", "-ot"} & options:
        raise ConfigError(f"--against {name}={binary}: has neither -ncmoe nor -ot: use a newer one")
    knobs: list[Knob] = ["ncmoe" if {"-ncmoe", "--n-cpu-moe"} & options else "ot"]
    on_gpu = any(one.machine.device.type == "cuda" for one in ours)
    knobs += ["cache"] if "--moe-cache-mib" in options and on_gpu else []
    return [LlamaBench(name, binary, one, knob, options) for one in ours for knob in knobs]


def layer_bytes(path: Path) -> list[int]:
    """Bytes of the routed experts of each layer, 0 where there are none."""
    sizes: dict[int, int] = {}
    for info in GGUFFile(path).tensors.values():
        match = re.match(r"blk\.(\d+)\.", info.name)
        if match:
            layer = int(match[1])
            sizes[layer] = sizes.get(layer, 0) + (info.nbytes if is_expert(info.name) else 0)
    return [sizes.get(layer, 0) for layer in range(max(sizes, default=-1) + 1)]


def fit_layers(peak: Callable[[int], int], layers: Sequence[int], limit: int) -> int:
    """The fewest layers to keep on the CPU with `peak(n)` at most `limit`; all of them if nothing suffices.

    peak: bytes of VRAM with the experts of the first n layers on the CPU; a run each, so as few as possible are made.
    """
    seen: dict[int, int] = {}

    def fits(n: int) -> bool:
        if n not in seen:
            seen[n] = peak(n)
        return seen[n] <= limit

    n = len(layers)
    if not fits(n):
        return n
    room = limit - seen[n]
    while n and layers[n - 1] <= room:  # a guess by the sizes
        n -= 1
        room -= layers[n]
    while not fits(n):
        n += 1
    while n and len(seen) < _TRIES and fits(n - 1):
        n -= 1
    return n


def fit_cache(peak: Callable[[int], int], limit: int) -> int:
    """The largest expert cache, in MiB, with `peak(mib)` at most `limit`, nearly; 0 if nothing suffices."""
    mib = max(0, (limit - peak(0)) // _MIB)
    while mib and (over := peak(mib) - limit) > 0:
        mib = max(0, mib - -(-over // _MIB) - 32)
    return mib


def _selection(tests: Sequence[Test]) -> list[str]:
    """Tests as options; their product may hold more, which is left out of the result."""
    prompts, gens, depths, both = (
        list(dict.fromkeys(values))
        for values in (
            [str(test.n_prompt) for test in tests if not test.n_gen],
            [str(test.n_gen) for test in tests if not test.n_prompt],
            [str(test.n_depth) for test in tests],
            [f"{test.n_prompt},{test.n_gen}" for test in tests if test.n_prompt and test.n_gen],
        )
    )
    selection = ["-p", ",".join(prompts) or "0", "-n", ",".join(gens) or "0"]
    for pair in both:
        selection += ["-pg", pair]
    return selection + (["-d", ",".join(depths)] if depths != ["0"] else [])


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as e:
        raise ConfigError(f"{command[0]}: cannot be run: {e.strerror}") from e


class _PeakVram:
    """While the block runs, the largest VRAM use beyond what there was before it. Not while speeds are measured."""

    def __init__(self, gpu: str) -> None:
        self.gpu, self.peak = gpu, 0
        self._before, self._stop = vram_in_use(gpu), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_PeakVram":
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.peak = max(self.peak, vram_in_use(self.gpu) - self._before)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
