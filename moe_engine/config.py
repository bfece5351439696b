"""What a user can set, with the defaults and every check of the values."""

import os
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from moe_engine.errors import ConfigError
from moe_engine.policies.registry import policy_of, require_native

ExpertHome = Literal["auto", "cpu", "cache"]
Activations = Literal["int8", "float"]
KVType = Literal["f16", "bf16", "f32", "q8_0"]
MissMode = Literal["auto", "cpu", "fetch"]
PrefetchMode = Literal["off", "auto", "always"]

# Of all policies tried the one with the most hits on recorded routing (docs/policies.md); the simulator's default too.
DEFAULT_POLICY = "blend:admit=outranks"

MAX_SEQUENCES = 8  # that decode together
DEFAULT_CTX = 4096  # tokens, or fewer if the model was trained for fewer
DEFAULT_UBATCH = 512  # where nothing better is chosen

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes from `"6GiB"`, `"500 MB"`, `"1.5g"` or an integer. Raises `ConfigError`."""
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ConfigError(f"size {text!r}: expected a number of bytes or text such as '6GiB'")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(text).strip().lower())
    if match is None:
        raise ConfigError(f"size {text!r}: expected a number with a unit, such as '6GiB', '500MB' or '1.5G'")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def format_size(nbytes: float) -> str:
    """Bytes as a short text with a binary unit: `"5.50 GiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def parse_rule(rule: object) -> tuple[re.Pattern[str], str]:
    """Pattern and place of REGEX=PLACE. Raises `ConfigError`."""
    pattern, _, place = rule.rpartition("=") if isinstance(rule, str) else ("", "", "")
    if not pattern or not (place in ("cache", "cpu", "disk") or re.fullmatch(r"cuda:\d+", place)):
        raise ConfigError(f"place is {rule!r}, expected REGEX=PLACE with a place of: cuda:0, cache, cpu, disk")
    try:
        return re.compile(pattern), place
    except re.error as e:
        raise ConfigError(f"place is {rule!r}, whose pattern is no regular expression: {e}") from e


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


class _Options:
    """Builds the dataclass from keyword arguments; unknown names are an error that lists the known ones."""

    @classmethod
    def of(cls, **options: Any) -> Self:
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option '{name}', expected one of: {', '.join(known)}")
        return cls(**options)


@dataclass(frozen=True, slots=True)
class EngineConfig(_Options):
    """How a model is loaded. All sizes are in bytes or text such as `"6GiB"`.

    device       "auto" (CUDA if there is one), "cpu", "cuda", "cuda:N", or "simulated": the code of the CUDA
                 path on tensors in RAM, for tests and development without a GPU.
    vram_budget  all VRAM the engine may use: weights, KV cache, workspace, expert slots and the CUDA context.
                 Default: 90 % of what is free.
    ram_budget   what the whole process may have resident in RAM, mapped file pages included. Routed experts get what
                 the rest leaves of it, less an eighth kept for what is allocated later; those that do not fit are read
                 from disk when they are needed. Default: what is available, less 2 GiB (at most half), for them alone.
    experts      where routed experts are computed: "cpu", "cache" (fetched into VRAM slots and computed
                 there), or "auto": "cache" if the budget has room for at least top_k experts.
    place        rules REGEX=PLACE on tensor names that say where layers' experts are: "cuda:0" for good in VRAM,
                 "cache", "cpu", or "disk" for read when needed; the first that matches decides (placement.py). Default:
                 all as `experts` says.
    cache_slots  an upper limit on the expert slots of each size; default: as many as the budget holds.
    miss         what a decode step does with experts that are in no slot: "cpu" computes them on the CPU, "fetch"
                 copies them into slots first, "auto" divides them so that both finish together.
    policy       who leaves the slots, and what is worth one: NAME[:key=value,...], of the policies with a native twin.
    lookahead    while the GPU is in attention, the CPU pulls experts that it will probably compute next from RAM into
                 its caches, as long as that or prefetch is measured to be faster. Results do not depend on it.
    prefetch     experts that will probably be needed two layers later are copied into slots while the link is idle:
                 "off", "always", or "auto", as long as that is measured to be faster.
    exact        tokens do not depend on the cache's size, contents or timing, bit for bit: every miss is fetched.
    trace        a file that the routing of everything computed is recorded to (traces.py).
    profile      whether slots begin with what earlier runs used most, kept in the user's cache folder (profile.py).
    n_sequence   sequences that can decode together (`generate_batch`); each has a KV cache of its own.
    eager        decode without a CUDA graph, one kernel at a time and without the native worker: the reference.
    threads      CPU threads of the kernels; default: all this process may use.
    ctx          tokens of context the KV cache holds; default: 4096, or less if the model was trained for less.
    activations  "int8": the CPU kernels, and on a GPU those for few tokens, round activations to 8 bits in blocks,
                 as other engines do, and a GPU's prompts round to bf16; "float": nothing is rounded (slower, for exact
                 comparisons).
    kv_dtype     type of the KV cache: "f16", "bf16", "f32" or "q8_0" (8 bits and a scale for each 32 values).
    ubatch       prompt tokens that go through the layers at once; default: 512 on the CPU, on a GPU as many as a
                 fifth of what is left for experts allows.
    """

    device: str = "auto"
    vram_budget: int | str | None = None
    ram_budget: int | str | None = None
    experts: ExpertHome = "auto"
    place: tuple[str, ...] = ()
    cache_slots: int | None = None
    miss: MissMode = "auto"
    policy: str = DEFAULT_POLICY
    lookahead: bool = True
    prefetch: PrefetchMode = "auto"
    exact: bool = False
    trace: str | None = None
    profile: bool = True
    n_sequence: int = 1
    eager: bool = False
    threads: int | None = None
    ctx: int | None = None
    activations: Activations = "int8"
    kv_dtype: KVType = "f16"
    ubatch: int | None = None

    def __post_init__(self) -> None:
        _check(
            isinstance(self.device, str) and bool(re.fullmatch(r"auto|cpu|simulated|cuda(:\d+)?", self.device)),
            "device",
            self.device,
            "auto, cpu, cuda, cuda:N or simulated",
        )
        choices = {
            "experts": ExpertHome,
            "activations": Activations,
            "kv_dtype": KVType,
            "miss": MissMode,
            "prefetch": PrefetchMode,
        }
        for name, kind in choices.items():
            value = getattr(self, name)
            _check(value in get_args(kind), name, value, f"one of: {', '.join(get_args(kind))}")
        for name in ("exact", "eager", "lookahead", "profile"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "True or False")
        for name in ("cache_slots", "threads", "ctx", "ubatch"):
            value = getattr(self, name)
            _check(value is None or _is_integer(value, 1), name, value, "an integer >= 1")
        in_range = _is_integer(self.n_sequence, 1) and self.n_sequence <= MAX_SEQUENCES
        _check(in_range, "n_sequence", self.n_sequence, f"an integer from 1 to {MAX_SEQUENCES}")
        _check(not (self.exact and self.miss == "cpu"), "miss", self.miss, "'auto' or 'fetch' with exact")
        _check(self.threads is None or self.threads <= 1024, "threads", self.threads, "at most 1024")
        for budget in (self.vram_budget, self.ram_budget):
            if budget is not None:
                parse_size(budget)
        place = (self.place,) if isinstance(self.place, str) else self.place
        _check(isinstance(place, list | tuple), "place", self.place, "a list of rules REGEX=PLACE")
        for rule in place:
            parse_rule(rule)
        object.__setattr__(self, "place", tuple(place))
        _check(isinstance(self.policy, str), "policy", self.policy, "a text such as 'lru' or 'lfu-decay:half_life=64'")
        require_native(policy_of(self.policy))
        _check(self.trace is None or isinstance(self.trace, str), "trace", self.trace, "the name of a file to write")
        _check(self.trace is None or self.n_sequence == 1, "n_sequence", self.n_sequence, "1 with a trace")

    def slots_at_once(self, top_k: int) -> int:
        """Slots that the experts of one layer of a step may need."""
        return top_k * (self.n_sequence if self.exact else 1)

    def staging_slots(self, top_k: int) -> int:
        """Slots of a pool that experts pass through in prompts, at least."""
        return top_k * self.n_sequence if self.eager else 2

    @property
    def n_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class SamplingParams(_Options):
    """How the next token is chosen.

    In this order: repeat penalty over the last 64 tokens, top-k, top-p, min-p, temperature, draw.

    max_tokens      how many tokens to generate at most.
    temperature     0: the most probable token, always (greedy).
    top_k           keep only the k most probable tokens; 0: all.
    top_p           keep the smallest set of tokens with this much probability; 1: all.
    min_p           drop tokens less probable than this share of the best one's probability; 0: none.
    repeat_penalty  divide the logits of recent tokens by this; default: 1.1 when sampling, 1 (off) when greedy.
    seed            for repeatable draws; default: a new one each time.
    stop            texts that end the generation; they are not part of the output.
    ignore_eos      go on after the model's own end of text: for benchmarks.
    """

    max_tokens: int = 128
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(_is_integer(self.max_tokens, 0), "max_tokens", self.max_tokens, "an integer >= 0")
        _check(_is_number(self.temperature, 0, 1e4), "temperature", self.temperature, "a number >= 0")
        _check(
            _is_integer(self.top_k, 0) and self.top_k < 1 << 31, "top_k", self.top_k, "an integer from 0 to 2^31 - 1"
        )
        _check(_is_number(self.top_p, 1e-9, 1), "top_p", self.top_p, "a number over 0, at most 1")
        _check(_is_number(self.min_p, 0, 1), "min_p", self.min_p, "a number from 0 to 1")
        penalty = self.repeat_penalty
        _check(penalty is None or _is_number(penalty, 1e-3, 1e3), "repeat_penalty", penalty, "a number over 0")
        seed_ok = self.seed is None or (_is_integer(self.seed, 0) and self.seed < 1 << 63)
        _check(seed_ok, "seed", self.seed, "an integer from 0 to 2**63 - 1")
        _check(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        ok = isinstance(stop, list | tuple) and all(isinstance(s, str) and s for s in stop)
        _check(ok, "stop", self.stop, "a text or a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))

    @property
    def penalty(self) -> float:
        if self.repeat_penalty is not None:
            return self.repeat_penalty
        return 1.1 if self.temperature > 0 else 1.0
