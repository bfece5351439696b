"""Who turns the last token into the next one: `EagerDecoder` plainly, `GraphDecoder` (graph_decoder.py) fast.

`begin` takes the sequences, `next` gives one token of each; after `drop` a sequence's tokens mean nothing.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_engine.config import EngineConfig
from moe_engine.decode_step import DecodeStep, Running, StepForm
from moe_engine.errors import ModelFormatError
from moe_engine.experts import Experts
from moe_engine.kernels.device import run_kernels
from moe_engine.kernels.sampling_kernel import variant_for
from moe_engine.layers import MixtureOfExperts
from moe_engine.model import Transformer
from moe_engine.recording import Recorder
from moe_engine.stats import Stats

NOT_FINITE = "the model's logits are not finite: the file's weights are damaged"


class Decoder(Protocol):
    """Decodes what prompts have left in the KV caches, one generation after the other.

    reset_stats -> begin -> next, next, ... with a drop now and then -> count
    """

    def begin(self, sequences: Sequence[Running], n_step: int) -> None:
        """Sequence i has KV cache i. `next` will be called at most `n_step` times."""
        ...

    def next(self) -> list[int]:
        """Computes the last token of each sequence and draws the one after it."""
        ...

    def drop(self, index: int) -> None:
        """A sequence that has ended while others go on."""
        ...

    def await_slots(self) -> None:
        """Returns when prompts find in VRAM what they rely on: slots may still be being filled."""
        ...

    def reset_stats(self) -> None:
        """A generation begins to count."""
        ...

    def count(self, stats: Stats) -> None:
        """Fills in what has happened to experts since `reset_stats`."""
        ...

    def close(self) -> None:
        """Ends what runs beside Python; the decoder cannot be used afterwards."""
        ...


class EagerDecoder:
    """One sequence after the other. forward: `(index, token, position)` to logits f32 `[n_vocab]` on the CPU."""

    def __init__(self, forward: Callable[[int, int, int], Tensor], experts: Experts) -> None:
        self.forward, self.experts = forward, experts
        self.sequences: list[Running | None] = []

    def begin(self, sequences: Sequence[Running], n_step: int) -> None:
        self.sequences = list(sequences)

    def next(self) -> list[int]:
        tokens = []
        for index, running in enumerate(self.sequences):
            if running is None:
                tokens.append(0)
                continue
            logits = self.forward(index, running.tokens[-1], len(running.tokens) - 1)
            tokens.append(running.sampler(logits, running.tokens))
        return tokens

    def drop(self, index: int) -> None:
        self.sequences[index] = None

    def await_slots(self) -> None:
        pass

    def reset_stats(self) -> None:
        self.experts.hits = self.experts.misses = 0

    def count(self, stats: Stats) -> None:
        stats.expert_hits, stats.expert_misses = self.experts.hits, self.experts.misses

    def close(self) -> None:
        pass


class StagedDecoder:
    """Runs the step kernel by kernel and fetches every expert as it is chosen: the reference for `GraphDecoder`."""

    def __init__(self, step: DecodeStep, recorder: Recorder | None = None) -> None:
        self.step, self._form, self._recorder = step, StepForm(1, "stage", "greedy"), recorder
        step.recorded = recorder is not None

    @torch.inference_mode()
    def begin(self, sequences: Sequence[Running], n_step: int) -> None:
        self.step.begin(sequences)
        self._form = StepForm(len(sequences), "stage", variant_for(running.params for running in sequences))

    @torch.inference_mode()
    def next(self) -> list[int]:
        number = int(self.step.step)
        self.step.run(self._form)
        if bool(self.step.sampler.bad.any()):
            raise ModelFormatError(NOT_FINITE)
        if self._recorder is not None:
            self._recorder.note_tokens(*self.step.routing(number, 1))
        tokens: list[int] = self.step.tokens[: self._form.n_token].tolist()
        return tokens

    @torch.inference_mode()
    def drop(self, index: int) -> None:
        self.step.positions[index] = -1

    def await_slots(self) -> None:
        pass

    def reset_stats(self) -> None:
        pass

    def count(self, stats: Stats) -> None:
        pass

    def close(self) -> None:
        pass


def can_use_step(config: EngineConfig, model: Transformer) -> bool:
    """Whether `DecodeStep` can run the model here: it needs a GPU, or Triton's interpreter."""
    fits = all(block.attn.can_decode for block in model.blk)
    has_experts = any(isinstance(block.ffn, MixtureOfExperts) for block in model.blk)
    return config.activations == "int8" and fits and has_experts and run_kernels(model.output_norm)
