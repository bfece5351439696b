"""What a benchmark runs: tests (what is timed), loads (how the model is loaded), and the order of both.

Every option takes a list; the product of all lists is run. Numbers also come as ranges, as in llama-bench:
`0-4096+1024` or `1-8*2`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from types import UnionType
from typing import Any, TypeVar, get_args

from moe_engine.config import EngineConfig
from moe_engine.errors import ConfigError

T = TypeVar("T")
_LARGEST = 1 << 24  # tokens
_MOST = 1000  # values of a range


@dataclass(frozen=True)
class Test:
    """Behind `n_depth` tokens of context: a prompt of `n_prompt` tokens, `n_gen` generated tokens, or one after the
    other."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    __test__ = False  # not one of pytest's

    @property
    def name(self) -> str:
        """As llama-bench writes it: `"pp512 @ d4096"`."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_token(self) -> int:
        """Tokens of a sequence whose time is taken."""
        return self.n_prompt + self.n_gen

    @property
    def n_ctx(self) -> int:
        """Context it needs: one token more than it counts, which a prompt ends or a generation starts with."""
        return self.n_depth + self.n_token + 1


@dataclass(frozen=True)
class Load:
    """Options of `Engine.load`, and which of them tell this load from the others of the benchmark.

    `vram_budget` may be a share of the routed experts (`"25%"`).
    """

    options: tuple[tuple[str, Any], ...]
    varied: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.options).get(name)

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.options if name in self.varied)


def numbers(option: str, texts: Sequence[str], low: int = 0) -> list[int]:
    """`["512,2048", "0-4096+1024"]` to integers, each once. Raises `ConfigError`."""
    found: list[int] = []
    for text in _pieces(texts):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", text)
        if match is None:
            raise ConfigError(f"{option} is {text!r}, expected integers or ranges such as 512,2048 or 0-4096+1024")
        first, last = int(match[1]), int(match[2] or match[1])
        operator, step = match[3] or "+", int(match[4] or 1)
        if not low <= first <= last <= _LARGEST:
            raise ConfigError(f"{option} is {text!r}, expected integers from {low} to {_LARGEST}, the larger one last")
        if (step, operator) in ((0, "+"), (0, "*"), (1, "*")) or (operator == "*" and first == 0):
            raise ConfigError(f"{option} is {text!r}: the range never ends")
        while first <= last:
            found.append(first)
            first = first + step if operator == "+" else first * step
            if len(found) > _MOST:
                raise ConfigError(f"{option} is {text!r}: more than {_MOST} values")
    return list(dict.fromkeys(found))


def pairs(option: str, texts: Sequence[str]) -> list[tuple[int, int]]:
    """`["512,128"]` to prompts and generations that follow each other. Raises `ConfigError`."""
    found = [numbers(option, [text], low=1) for text in texts]
    for text, pair in zip(texts, found, strict=True):
        if text.count(",") != 1 or not 1 <= len(pair) <= 2:
            raise ConfigError(f"{option} is {text!r}, expected PROMPT,TOKENS such as 512,128")
    return [(pair[0], pair[-1]) for pair in found]


def all_tests(
    n_prompt: Sequence[int], n_gen: Sequence[int], n_depth: Sequence[int], both: Sequence[tuple[int, int]] = ()
) -> list[Test]:
    """Prompts, generations, and pairs of both, at every depth. Raises `ConfigError` if nothing is left to measure."""
    found = [
        Test(prompt, gen, depth)
        for depth in n_depth
        for prompt, gen in (*((n, 0) for n in n_prompt if n), *((0, n) for n in n_gen if n), *both)
    ]
    if not found:
        raise ConfigError("nothing to measure: -p and -n are both 0")
    return list(dict.fromkeys(found))


def sweep(n_prompt: Sequence[int], n_gen: Sequence[int], n_depth: Sequence[int]) -> list[Test]:
    """One prompt size and one generation at depths that grow by the prompt, up to the largest depth."""
    if len(n_prompt) != 1 or len(n_gen) != 1 or not n_prompt[0] or not n_gen[0]:
        raise ConfigError("--sweep takes one -p (its step), one -n, and the deepest -d")
    return all_tests(n_prompt, n_gen, range(0, max(n_depth) + 1, n_prompt[0]))


def loads(options: Mapping[str, Sequence[str]]) -> list[Load]:
    """The product of lists of texts by name of an `EngineConfig` field. Raises `ConfigError`.

    Lists of a value each, or of none, are no variation.
    """
    values = {name: [_value(name, text) for text in _pieces(texts)] for name, texts in options.items() if texts}
    values = {name: list(dict.fromkeys(found)) for name, found in values.items()}
    varied = tuple(name for name, found in values.items() if len(found) > 1)
    return [Load(tuple(zip(values, chosen, strict=True)), varied) for chosen in product(*values.values())]


def snake(items: Sequence[T], repetitions: int) -> Iterator[tuple[int, T]]:
    """Repetition by repetition all items, every second time backwards: (repetition, item).

    So a machine that slows down over time does not favour the first ones, and what a repetition ends with (a loaded
    model) the next one begins with.
    """
    for repetition in range(repetitions):
        for item in reversed(items) if repetition % 2 else items:
            yield repetition, item


def _pieces(texts: Sequence[str]) -> list[str]:
    """Split at commas, but not within settings such as `lfu-decay:half_life=64,admit=always`."""
    found: list[str] = []
    for text in texts:
        inside = False
        for piece in text.split(","):
            if inside and "=" in piece and ":" not in piece.split("=")[0]:
                found[-1] += "," + piece
            else:
                found.append(piece.strip())
            inside = ":" in found[-1]
    return found


def _value(name: str, text: str) -> Any:
    """A text as the field's type has it."""
    types: dict[str, Any] = {field.name: field.type for field in fields(EngineConfig)}
    if name not in types:
        raise ConfigError(f"unknown option '{name}', expected one of: {', '.join(types)}")
    kinds = get_args(types[name]) if isinstance(types[name], UnionType) else (types[name],)
    if text.lower() in ("none", "default") and type(None) in kinds:
        return None
    if bool in kinds:
        if text.lower() not in ("0", "1", "false", "true"):
            raise ConfigError(f"{name} is {text!r}, expected true or false")
        return text.lower() in ("1", "true")
    if int in kinds and re.fullmatch(r"\d+", text):
        return int(text)
    return text
