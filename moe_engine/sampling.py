"""Chooses the next token from logits."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from moe_engine.config import SamplingParams
from moe_engine.errors import ModelFormatError

REPEAT_WINDOW = 64  # tokens that the repeat penalty looks back


class Sampler:
    """Draws tokens as `SamplingParams` says; one per generation, it owns the random state."""

    def __init__(self, params: SamplingParams, suppress: Collection[int] = ()) -> None:
        self.params, self.suppress = params, list(suppress)
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token id. logits: f32 `[n_vocab]`, any device. history: prompt and tokens so far.

        Raises `ModelFormatError` when the logits are not numbers, which damaged weights cause.
        """
        logits = logits.detach().to("cpu", copy=True)
        if not bool(logits.isfinite().all()):
            raise ModelFormatError("the model's logits are not finite: the file's weights are damaged")
        logits[self.suppress] = float("-inf")
        self._penalize(logits, history)
        if self.params.temperature == 0:
            return int(logits.argmax())
        values, ids = self._candidates(logits)
        probabilities = (values / self.params.temperature).softmax(dim=0)
        return int(ids[torch.multinomial(probabilities, 1, generator=self.generator)])

    def _penalize(self, logits: Tensor, history: Sequence[int]) -> None:
        recent = torch.tensor(sorted(set(history[-REPEAT_WINDOW:])), dtype=torch.long)
        if self.params.penalty == 1.0 or not len(recent):
            return
        values = logits[recent]
        logits[recent] = torch.where(values > 0, values / self.params.penalty, values * self.params.penalty)

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and ids that top-k, top-p and min-p leave, most probable first."""
        k = min(self.params.top_k or len(logits), len(logits))
        values, ids = logits.topk(k)
        probabilities = values.softmax(dim=0)
        # A token stays if what is more probable than it does not yet reach top_p.
        keep = probabilities.cumsum(0) - probabilities < self.params.top_p
        keep &= probabilities >= self.params.min_p * probabilities[0]
        keep[0] = True
        return values[keep], ids[keep]
