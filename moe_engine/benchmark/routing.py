"""Recorded routing for a model of another shape, to follow in place of its router's choices."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_engine.decode_step import DecodeStep
from moe_engine.errors import ConfigError, TraceFormatError
from moe_engine.kernels.worker import MAX_AHEAD
from moe_engine.trace_npz import import_npz
from moe_engine.traces import Trace

LATER = 640  # tokens by which a recorded layer is shifted when it is used again
APART = 5  # recorded layers between those that are joined

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class RecordedRouting:
    """trace: what was chosen. ahead: int32 `[MAX_AHEAD, n_token, n_layer, top_k]`, what was predicted of it, best
    first: by the layer before, and by the one before that, where there is one; None if that was not recorded."""

    trace: Trace
    ahead: IntArray | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """A trace file, or an archive with an array 'ids' and perhaps 'ahead'. Raises `TraceFormatError`."""
        if path.suffix != ".npz":
            return cls(Trace.load(path))
        trace = import_npz(path)
        with np.load(path, allow_pickle=False) as archive:
            if "ahead" not in archive:
                return cls(trace)
            try:
                ahead = archive["ahead"]
            except ValueError as e:
                raise TraceFormatError(f"{path}: array 'ahead' cannot be read ({e})") from e
        if ahead.shape != (MAX_AHEAD, *trace.ids.shape) or ahead.dtype.kind not in "iu":
            raise TraceFormatError(
                f"{path}: array 'ahead' is {ahead.dtype} {list(ahead.shape)}, expected integers "
                f"{[MAX_AHEAD, *trace.ids.shape]}"
            )
        for distance, of_layers in enumerate(ahead, 1):
            used = of_layers[:, distance:]  # the first layers are predicted by none
            if used.size and not 0 <= used.min() <= used.max() < trace.model.n_expert:
                raise TraceFormatError(
                    f"{path}: array 'ahead' has ids from {used.min()} to {used.max()} for layers {distance} and on, "
                    f"expected 0 to {trace.model.n_expert - 1}"
                )
        if trace.model.n_layer <= MAX_AHEAD + 1:
            raise TraceFormatError(f"{path}: predictions of {trace.model.n_layer} layers are too few to stand for more")
        return cls(trace, ahead.astype(np.int32))

    def mapped(self, n_layer: int, n_expert: int, top_k: int) -> tuple[Tensor, Tensor | None]:
        """Onto a model, for `DecodeStep.replay` and `replay_ahead`: choices int32 `[n_step, n_layer, top_k]`, and
        predictions `[MAX_AHEAD, n_step, n_layer, top_k]`.

        A model with g times as many experts joins g recorded layers, one choice in g from each, so that the share of
        experts in use and their locality stay those of the recording (with the bench's own on 128 experts, LRU over all
        layers hits 46 % with 25 % of the experts in slots and 77 % with 50 %; the recording itself 46 and 76). Layers
        beyond the recorded ones repeat them some hundreds of tokens later. Predictions keep the recorded recall; but
        what layer 0 predicts is much worse than the rest, in all models, so where layers predicted from it, or not at
        all, stand for later ones, they are predicted as well as the layer behind them. Raises `ConfigError` if the
        shapes do not go together.
        """
        recorded = self.trace.model
        if n_expert % recorded.n_expert or top_k > recorded.top_k:
            raise ConfigError(
                f"the trace has {recorded.top_k} of {recorded.n_expert} experts, which cannot stand for the model's "
                f"{top_k} of {n_expert}: expected at least as many choices, and a divisor of its experts"
            )
        groups, ids = n_expert // recorded.n_expert, self.trace.ids.astype(np.int32)

        def joined(layer: int, guesses: IntArray | None) -> IntArray:
            """A layer's choices, or what is guessed of them."""
            found = np.empty_like(ids[:, 0])
            for group in range(groups):
                source, later = (layer + APART * group) % recorded.n_layer, -(layer // recorded.n_layer) * LATER
                part = ids[:, source]
                mine = part[:, group::groups]
                if guesses is not None:
                    mine = _guessed(part, guesses[:, source], mine)
                found[:, group::groups] = np.roll(mine, later, axis=0) + group * recorded.n_expert
            return found[:, :top_k]

        choices = np.stack([joined(layer, None) for layer in range(n_layer)], axis=1)
        if self.ahead is None:
            return torch.from_numpy(choices), None
        predicted = []
        for distance, ahead in enumerate(self.ahead, 1):
            further = _as_further_on(ids, ahead, distance + 1, recorded.n_expert)
            layers = [joined(layer, ahead if layer == distance else further) for layer in range(n_layer)]
            predicted.append(np.stack(layers, axis=1))
        return torch.from_numpy(choices), torch.from_numpy(np.stack(predicted))

    def follow(self, step: DecodeStep) -> None:
        """Makes a step that has not run yet take these choices in place of its routers'. Raises as `mapped`."""
        box = step.mailbox
        choices, ahead = self.mapped(box.n_layer, box.n_expert, box.top_k)
        step.replay = choices.to(step.tokens.device)
        step.replay_ahead = None if ahead is None else ahead.to(step.tokens.device)


def _as_further_on(ids: IntArray, ahead: IntArray, good: int, n_expert: int) -> IntArray:
    """Predictions whose first layers, up to the first `good` one, are right where that one's are."""
    found = (ids[:, good, :, None] == ahead[:, good, None]).any(2)[:, None]  # [n_token, 1, top_k]
    first = ids[:, :good]
    others = (first + np.random.default_rng(0).integers(1, n_expert, first.shape, dtype=np.int32)) % n_expert
    return np.concatenate([np.where(found, first, others), ahead[:, good:]], axis=1)


def _guessed(choices: IntArray, guesses: IntArray, chosen: IntArray) -> IntArray:
    """As many guesses as there are `chosen` ones of a layer's choices: those of them that were guessed, and wrong
    ones."""
    right, other = ((guesses[:, :, None] == some[:, None]).any(2) for some in (chosen, choices))
    best = np.argsort(np.where(right, 0, np.where(other, 2, 1)), axis=1, kind="stable")[:, : chosen.shape[1]]
    return np.take_along_axis(guesses, np.sort(best, axis=1), axis=1)
