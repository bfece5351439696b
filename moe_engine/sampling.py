"""Chooses the next token from logits. `kernels/sampling_kernel.py` does the same on a GPU."""

import secrets
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from moe_engine.config import SamplingParams
from moe_engine.errors import ModelFormatError

REPEAT_WINDOW = 64  # tokens that the repeat penalty looks back


class Sampler:
    """Draws tokens as `SamplingParams` says. The draw depends on the seed, the position and the logits alone."""

    def __init__(self, params: SamplingParams, suppress: Collection[int] = ()) -> None:
        self.params, self.suppress = params, list(suppress)
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        # Rounded to f32, as the GPU holds them
        settings = torch.tensor([params.temperature, params.top_p, params.min_p, params.penalty], dtype=torch.float32)
        self.temperature, self.top_p, self.min_p, self.penalty = settings.tolist()

    def __call__(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token id. logits: f32 `[n_vocab]`, any device. history: prompt and tokens so far.

        Raises `ModelFormatError` when the logits are not numbers, which damaged weights cause.
        """
        logits = logits.detach().to("cpu", copy=True)
        if not bool(logits.isfinite().all()):
            raise ModelFormatError("the model's logits are not finite: the file's weights are damaged")
        logits[self.suppress] = float("-inf")
        self._penalize(logits, history)
        if self.temperature == 0:
            return int(logits.argmax())
        values, ids = self._candidates(logits)
        cumulative = (_below_best(values) / self.temperature).exp().cumsum(0)
        place = int((cumulative <= uniform(self.seed, len(history)) * cumulative[-1]).sum())
        return int(ids[min(place, len(ids) - 1)])

    def _penalize(self, logits: Tensor, history: Sequence[int]) -> None:
        # A prompt may hold ids of padding rows, which are no tokens to draw
        recent = torch.tensor(sorted({t for t in history[-REPEAT_WINDOW:] if t < len(logits)}), dtype=torch.long)
        if self.penalty != 1.0:
            values, penalty = logits[recent], torch.tensor(self.penalty)
            logits[recent] = torch.where(values > 0, values / penalty, values * penalty)

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and ids that top-k, top-p and min-p leave, most probable first, of equal ones the lowest id."""
        k = min(self.params.top_k or len(logits), len(logits))
        # Sorting all takes long, and topk does not say which of equal ones it takes
        ids = torch.arange(len(logits)) if k == len(logits) else (logits >= logits.topk(k).values[-1]).nonzero()[:, 0]
        values, order = logits[ids].sort(descending=True, stable=True)
        values, ids = values[:k], ids[order[:k]]
        weights = _below_best(values).exp()
        # A token stays if what is more probable than it does not yet reach top_p.
        keep = (weights.cumsum(0) - weights < self.top_p * weights.sum()) | (self.top_p >= 1)
        keep &= weights >= self.min_p
        n_kept = max(1, int(keep.sum()))
        return values[:n_kept], ids[:n_kept]


def _below_best(values: Tensor) -> Tensor:
    """Sorted logits less the first, f64: so exact that the order of a sum never changes a draw."""
    return values.double() - values[0].double()


def uniform(seed: int, position: int) -> float:
    """The random number in (0, 1) for the token at a position."""
    return (philox((position, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0] + 0.5) / 2**32


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3
