"""What a user holds while text is generated, and afterwards: tokens become text, and end where they should."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_engine.config import SamplingParams
from moe_engine.stats import Stats
from moe_engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    """A finished generation. `tokens` are the generated ones, without the one that stopped it."""

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: Literal["stop", "length"]
    stats: Stats


class Generation:
    """A running generation: iterate for pieces of text (never half a character), then ask for `result()`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tokens: list[int],
        params: SamplingParams,
        continues_text: bool,
        decode: "Callable[[Sequence[Generation]], Iterator[None]]",
    ) -> None:
        """Use `Engine.stream`. continues_text: a space before the first word belongs to the text. decode: yields
        whenever the generations have been given a token each.
        """
        self.prompt_tokens, self.tokens = prompt_tokens, list[int]()
        self.params, self.stats = params, Stats()
        self.finish_reason: Literal["stop", "length"] = "length"
        self.done = params.max_tokens == 0
        self._stop_ids = () if params.ignore_eos else tokenizer.stop_ids
        self._text = tokenizer.stream(continuation=continues_text)
        self._held = ""  # text that may be the beginning of a stop string
        self._pieces: list[str] = []
        self._iterator = self._run(decode)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._iterator)

    def result(self) -> Result:
        """The finished generation; runs it to its end if it has not been iterated."""
        for _ in self:
            pass
        return self.so_far()

    def so_far(self) -> Result:
        """What there is, without going on."""
        return Result("".join(self._pieces), self.tokens, self.prompt_tokens, self.finish_reason, self.stats)

    def _run(self, decode: "Callable[[Sequence[Generation]], Iterator[None]]") -> Iterator[str]:
        given = 0
        for _ in decode([self]):
            yield from self._pieces[given:]
            given = len(self._pieces)

    def accept(self, token: int, full: bool) -> None:
        """Takes the next token, and ends at stop tokens, stop strings, `max_tokens` or where the context is full."""
        if token in self._stop_ids:
            self._end("stop", self._held + self._text.flush())
            return
        self.tokens.append(token)
        held = self._held + self._text.push(token)
        cut = min((i for stop in self.params.stop if (i := held.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self._end("stop", held[:cut])
        elif full or len(self.tokens) == self.params.max_tokens:
            self._end("length", held + self._text.flush())
        else:
            safe = len(held) - _overlap(held, self.params.stop)
            self._give(held[:safe])
            self._held = held[safe:]

    def _end(self, reason: Literal["stop", "length"], text: str) -> None:
        self.finish_reason, self.done = reason, True
        self._give(text)

    def _give(self, text: str) -> None:
        if text:
            self._pieces.append(text)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)
