"""One decode step on the device, embedding to sampled token: what a CUDA graph captures.

    tokens -> embedding -> layers -> logits -> sampled tokens -> host
                             |
        attention, router -> post misses -> hits, shared expert -> wait for the CPU's share

Everything a step depends on (tokens, positions, the sampler's settings, slot table) is read from device tensors, so
one capture serves every step of a form. Python runs this once per form; then the graph is replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_engine.backend import decode_weight
from moe_engine.config import SamplingParams
from moe_engine.expert_cache import CachedExperts
from moe_engine.kernels.decode_product import matvec, moe_decode
from moe_engine.kernels.mailbox import finish, post, wait
from moe_engine.kernels.router_kernel import NextRouter, Replay, Routing, route_and_lookup
from moe_engine.kernels.sampling_kernel import SamplerState, Variant, sample
from moe_engine.kernels.worker import RING, Mailbox
from moe_engine.kv_cache import KVCache
from moe_engine.layers import MixtureOfExperts, Normed
from moe_engine.model import Transformer
from moe_engine.rope import Rope
from moe_engine.sampling import Sampler

Misses = Literal["none", "cpu", "late", "merge", "stage"]
"""Who computes an expert that is not in a slot.

none   there is no such expert, and nothing is posted
cpu    the CPU
late   the CPU, or the GPU once it has been fetched
merge  the GPU, in one sum with the hits: the result does not depend on what was cached
stage  the same without worker and mailbox, synchronously: the reference, not to be captured
"""


@dataclass(frozen=True)
class StepForm:
    """What is fixed when a step is captured."""

    n_token: int  # one of each sequence; or of one sequence's prompt
    misses: Misses
    sampling: Variant
    ahead: int = 0  # of how many of the next layers each predicts what they choose
    prompt_of: int | None = None  # the sequence whose prompt's next tokens these are: nothing is sampled


@dataclass
class Running:
    """A sequence that is being continued. `tokens`: prompt and generated ones; the last is not in the KV cache yet."""

    tokens: list[int]
    params: SamplingParams
    sampler: Sampler


PROMPT_TOKENS = 32
"""Of a prompt that go through one step at most. The experts that many miss together are read once."""


class DecodeStep:
    """The step of a model; `run` launches it.

    Attributes are device tensors that the host sets before a generation: tokens, positions int32 `[n_sequence]` (the
    last token of each sequence and where it stands; below zero: none), step int64 `[1]`, `sampler`.
    recorded: whether steps in which nothing can miss post their routing too.
    replay: int32 `[n_step, n_layer, top_k]`, recorded routing to follow in place of the router's choice (benchmarks).
    replay_ahead: int32 `[MAX_AHEAD, n_step, n_layer, top_k]`, what was predicted of each layer by the one before, and
    by the one before that; None: nothing is predicted then.
    stamps: where the kernels note the time of what they do in the last step (`new_stamps`; benchmarks).
    """

    def __init__(
        self,
        model: Transformer,
        experts: CachedExperts,
        cache: KVCache,
        rope: Rope,
        sampler: SamplerState,
    ) -> None:
        device = model.output_norm.device
        self.model, self.experts, self.cache, self.rope, self.sampler = model, experts, cache, rope, sampler
        n_layer, n_expert = experts.slot_table.shape
        n = cache.n_sequence
        n_row = max(n, PROMPT_TOKENS)
        pinned = device.type == "cuda"
        self.mailbox = Mailbox.allocate(n_layer, n_expert, model.router.top_k, model.hidden, n_row, pinned)
        self.tokens = torch.zeros(n, dtype=torch.int32, device=device)
        self.positions = torch.full((n,), -1, dtype=torch.int32, device=device)
        self.prompt_tokens, self.prompt_positions = (
            torch.zeros(PROMPT_TOKENS, dtype=torch.int32, device=device) for _ in range(2)
        )
        self._never_bad = torch.zeros(PROMPT_TOKENS, dtype=torch.int32, device=device)
        self.step = torch.ones(1, dtype=torch.int64, device=device)
        self.waited = torch.zeros(n_layer, dtype=torch.int64, device=device)  # nanoseconds
        self.recorded = False
        self.replay: Tensor | None = None
        self.replay_ahead: Tensor | None = None
        self._mixtures = [block.ffn for block in model.blk if isinstance(block.ffn, MixtureOfExperts)]
        self.stamps: Tensor | None = None

    def begin(self, sequences: Sequence[Running]) -> None:
        """Sets what the next step depends on."""
        for index, running in enumerate(sequences):
            self.sampler.set(index, running.params, running.sampler.seed, running.tokens)
        n = len(sequences)
        for target, values in (
            (self.tokens, [running.tokens[-1] for running in sequences]),
            (self.positions, [len(running.tokens) - 1 for running in sequences]),
        ):
            target.fill_(-1)
            target[:n] = torch.tensor(values, dtype=target.dtype)

    def set_prompt(self, ids: Sequence[int], position: int) -> None:
        """Sets what a step with the next tokens of a prompt depends on; at most PROMPT_TOKENS, from `position` on."""
        n = len(ids)
        self.prompt_tokens[:n] = torch.tensor(ids, dtype=torch.int32)
        self.prompt_positions.fill_(-1)
        self.prompt_positions[:n] = torch.arange(position, position + n, dtype=torch.int32)

    def run(self, form: StepForm) -> None:
        """Launches everything; returns at once on a GPU."""
        model, n, tokens, positions = self.model, form.n_token, self.tokens, self.positions
        if form.prompt_of is not None:
            tokens, positions = self.prompt_tokens, self.prompt_positions
        tokens, positions = tokens[:n], positions[:n]
        starts, caches = positions, self.cache.first(n)
        if form.prompt_of is not None:
            starts, caches = positions[:1], [layer.tensors for layer in self.cache.sequence(form.prompt_of)]
        x = model.token_embd(tokens)
        for block, cache in zip(model.blk, caches, strict=True):
            x = block.attn.decode(Normed.of(x, block.attn_norm, model.eps), x, starts, cache, self.rope)
            normed = Normed.of(x, block.ffn_norm, model.eps)
            if isinstance(block.ffn, MixtureOfExperts):
                x = self._mixture(block.ffn, normed, x, positions, form)
            else:
                x = block.ffn.decode(normed, x)
        if form.prompt_of is not None:
            finish(self.mailbox, self.step, positions, tokens, self._never_bad[:n])
            return
        last = Normed.of(x, model.output_norm, model.eps)
        logits = matvec(last.values, decode_weight(model.output), activations=last.rounded)
        sample(logits, self.sampler, positions + 1, tokens, variant=form.sampling)
        finish(self.mailbox, self.step, positions, tokens, self.sampler.bad, stamps=self.stamps)

    def routing(self, step: int, n_token: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Experts and weights `[n_token, n_layer, top_k]` that a step has posted, once its tokens have come.

        Of the last RING steps only.
        """
        box = self.mailbox
        return (
            self._posted(step, n_token, box.ids_offset, np.int32),
            self._posted(step, n_token, box.weights_offset, np.float32),
        )

    def slots_found(self, step: int, n_token: int) -> npt.NDArray[np.int32]:
        """Likewise the slots in which the step has found its experts, -1: in none."""
        return self._posted(step, n_token, self.mailbox.slots_offset, np.int32)

    def _posted(self, step: int, n_token: int, offset: int, kind: type[Any]) -> npt.NDArray[Any]:
        """A field of a step's messages, `[n_token, n_layer, top_k]`."""
        box = self.mailbox
        messages = box.messages.view(RING, box.n_layer, -1)[step % RING].numpy()
        due = step * (box.n_layer + 1) + np.arange(box.n_layer)
        assert (messages[:, :8].view(np.int64)[:, 0] == due).all(), "a step that has not posted, or was overwritten"
        values = messages[:, offset : offset + 4 * n_token * box.top_k].copy().view(kind)
        by_layer: npt.NDArray[Any] = values.reshape(box.n_layer, n_token, box.top_k)
        return by_layer.swapaxes(0, 1)

    def _mixture(self, moe: MixtureOfExperts, x: Normed, residual: Tensor, positions: Tensor, form: StepForm) -> Tensor:
        """Router, then hits and shared expert while the CPU works on the misses."""
        layer, table = self.experts.index[moe.layer], self.experts.slot_table
        pool = self.experts.pool_of(layer)
        layout, slots = pool.layout, pool.slots
        routing = route_and_lookup(
            x.values,
            moe.router,
            table[layer],
            weight=moe.ffn_gate_inp,
            bias=moe.exp_probs_b,
            ahead=self._next_routers(moe, form.ahead),
            replay=None if self.replay is None else Replay(self.replay, self.step, layer),
        )
        if form.misses != "none" or self.recorded or self.replay is not None:
            post(
                self.mailbox,
                layer,
                self.step,
                positions,
                routing,
                x.values,
                replay_ahead=self.replay_ahead,
                stamps=self.stamps,
            )

        def on_gpu(chosen: Tensor, add_to: Tensor) -> Tensor:
            return moe_decode(x.values, slots, layout, chosen, routing.weights, activations=x.rounded, residual=add_to)

        out = residual if moe.shared is None else moe.shared.decode(x, residual)
        if form.misses == "stage":
            return out + self.experts.staged(layer, x.values, routing.ids, routing.weights)
        if form.misses == "merge":
            self._wait(layer, routing)
            return on_gpu(routing.slots, out)
        # Where there are no slots nothing can hit
        hits = on_gpu(routing.slots, out) if len(slots) else out
        if form.misses == "none":
            return hits
        out = torch.empty_like(hits)
        late = torch.empty_like(routing.slots) if form.misses == "late" and len(slots) else None
        self._wait(layer, routing, out=out, hits=hits, late=late)
        return out if late is None else on_gpu(late, out)

    def _next_routers(self, moe: MixtureOfExperts, n: int) -> list[NextRouter]:
        """Of the next layers of experts, as far as there are any that route alike."""
        if self.replay is not None and self.replay_ahead is None:
            return []
        assert self.replay_ahead is None or (
            self.replay is not None and self.replay_ahead.shape[1:] == self.replay.shape
        )
        layer = self.experts.index[moe.layer]
        following = self._mixtures[layer + 1 : layer + 1 + n]
        if any((other.exp_probs_b is None) != (moe.exp_probs_b is None) for other in following):
            return []
        return [NextRouter(other.ffn_gate_inp, other.exp_probs_b) for other in following]

    def _wait(
        self,
        layer: int,
        routing: Routing,
        out: Tensor | None = None,
        hits: Tensor | None = None,
        late: Tensor | None = None,
    ) -> None:
        wait(
            self.mailbox,
            layer,
            self.step,
            routing,
            self.experts.slot_table,
            self.waited,
            out=out,
            hits=hits,
            late=late,
            stamps=self.stamps,
        )
