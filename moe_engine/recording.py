"""Records the routing of everything an engine computes into a trace file (traces.py)."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_engine.traces import FRAME_TOKENS, TraceModel, TraceWriter


class Recorder:
    """Collects tokens into frames; `close` writes the last one. Layers are the MoE layers, in order."""

    def __init__(self, path: str | Path, model: TraceModel) -> None:
        """Raises ConfigError if the file cannot be written."""
        self._model, self._writer = model, TraceWriter(path, model)
        self._layers: list[tuple[Tensor, Tensor]] = []  # of the tokens at hand, by layer
        self._ids: list[NDArray[np.uint16]] = []
        self._weights: list[NDArray[np.float16]] = []
        self._begins = False
        self.n_token = 0

    def begin(self) -> None:
        """The next tokens begin a sequence. What an interrupted one has left unfinished is given up."""
        self._layers.clear()
        self.flush()
        self._begins = True

    def note_layer(self, expert_ids: Tensor, weights: Tensor) -> None:
        """The next layer's choices `[n_token, top_k]` for the tokens that are being computed, best first."""
        self._layers.append((expert_ids, weights))

    def end_tokens(self) -> None:
        """All layers were noted."""
        ids, weights = (torch.stack(parts, 1).cpu() for parts in zip(*self._layers, strict=True))
        self._layers.clear()
        self.note_tokens(ids.numpy(), weights.numpy())

    def note_tokens(self, ids: NDArray[np.generic], weights: NDArray[np.generic]) -> None:
        """ids, weights `[n_token, n_layer, top_k]`."""
        for start in range(0, len(ids), FRAME_TOKENS):
            part = slice(start, start + FRAME_TOKENS)
            self._ids.append(ids[part].astype(np.uint16))
            self._weights.append(weights[part].astype(np.float16))
            self.n_token += len(ids[part])
            if sum(map(len, self._ids)) >= FRAME_TOKENS:
                self.flush()

    def flush(self) -> None:
        """Writes what has been collected."""
        if not self._ids:
            return
        ids, weights = np.concatenate(self._ids), np.concatenate(self._weights)
        self._ids.clear()  # also where they cannot be written: once is enough
        self._weights.clear()
        self._writer.append(ids, weights, begins=self._begins)
        self._begins = False

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._writer.close()
