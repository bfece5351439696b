"""Perplexity of a text, by llama.cpp's protocol so that figures compare."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_engine.engine import Engine
from moe_engine.errors import ConfigError

LEAST_CTX = 6  # two predictions are scored, which have a standard error


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss over the scored predictions. chunks: windows of the text."""

    ppl: float
    error: float  # standard error of `ppl`
    tokens: int  # predictions scored
    chunks: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    engine: Engine, text: str, ctx: int = 512, progress: Callable[[int, int, float], None] | None = None
) -> Perplexity:
    """Cuts `text` into windows of `ctx` tokens, each from an empty context, and scores each one's second half.

    Where the model wants a start token it replaces the window's first. progress: called with (windows done,
    windows in all, perplexity so far). Raises `ConfigError` if the text is shorter than one window.
    """
    if ctx < LEAST_CTX:
        raise ConfigError(f"ctx is {ctx}, expected at least {LEAST_CTX}")
    if ctx > engine.cache.capacity:
        raise ConfigError(f"ctx is {ctx}, expected at most {engine.cache.capacity}, the engine's context")
    tokens = engine.tokenizer.encode(text)
    n_chunk = len(tokens) // ctx
    if n_chunk == 0:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, expected at least {ctx}, one window: take a longer text or less ctx"
        )
    losses = []
    for chunk in range(n_chunk):
        window = tokens[chunk * ctx : (chunk + 1) * ctx]
        targets = torch.tensor(window[ctx // 2 + 1 :])
        if engine.tokenizer.add_bos and engine.tokenizer.bos_id is not None:
            window[0] = engine.tokenizer.bos_id
        logits = engine.forward(window)[ctx // 2 : -1]  # each row predicts the token after it
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double())
        if progress is not None:
            progress(chunk + 1, n_chunk, math.exp(torch.cat(losses).mean().item()))
    scored = torch.cat(losses)
    ppl = math.exp(scored.mean().item())
    return Perplexity(ppl, ppl * scored.std().item() / math.sqrt(len(scored)), len(scored), n_chunk)
