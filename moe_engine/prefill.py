"""Prompts into the KV cache: through the layers in micro-batches, or, short ones, in steps of the decoder."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_engine.decode_step import PROMPT_TOKENS
from moe_engine.decoder import Decoder
from moe_engine.expert_cache import CachedExperts
from moe_engine.experts import Experts
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.kernels.launch import Launched
from moe_engine.kv_cache import KVCache
from moe_engine.model import Transformer
from moe_engine.prompt_split import PromptRates, PromptWay
from moe_engine.recording import Recorder
from moe_engine.rope import Rope
from moe_engine.routing_estimate import estimate


class Prefill:
    """Runs a sequence's tokens, of which those before the first given are in its KV cache.

    ubatch: tokens of a micro-batch at most. recorder: gets the routing. Call it for the KV cache alone, `hidden` for
    the hidden states too.
    """

    def __init__(
        self,
        model: Transformer,
        experts: Experts,
        cache: KVCache,
        rope: Rope,
        decoder: Decoder,
        ubatch: int,
        recorder: Recorder | None = None,
    ) -> None:
        self.model, self.cache, self.rope, self.decoder, self.ubatch = model, cache, rope, decoder, ubatch
        self.device = model.output_norm.device
        self._experts = experts
        self._recorder = recorder
        self._way: PromptWay | None = None
        self._steps: GraphDecoder | None = None  # takes short prompts, where it may

    def learn_ways(self) -> None:
        """Short prompts take the way that has been faster; until this is called, micro-batches."""
        on_gpu = self.device.type == "cuda"  # on the simulated device steps would be slow
        if isinstance(self.decoder, GraphDecoder) and self.decoder.takes_prompts and on_gpu:
            self._steps, self._way = self.decoder, self._learning_way(self.decoder.step.experts)

    def _learning_way(self, experts: CachedExperts) -> PromptWay:
        n_layer, n_expert = experts.slot_table.shape
        mean_bytes = sum(layout.slot_bytes for layout in experts.layouts) / n_layer
        missing = 1 - experts.n_slot / (n_layer * n_expert)
        top_k = self.model.router.top_k
        routing = estimate(None, n_expert, top_k, n_sequence=1)
        return PromptWay(n_layer, n_expert, top_k, mean_bytes, missing, PROMPT_TOKENS, routing)

    def __call__(self, ids: Sequence[int], first: int = 0, index: int = 0) -> None:
        """Brings `ids[first:]` into the KV cache of sequence `index`; returns when it is done."""
        n = len(ids) - first
        if n == 0:
            return
        started, compiled, in_steps, typical = time.perf_counter(), Launched.first_seconds, False, True
        rates = self._rates()
        if self._way is not None and len(ids) + PROMPT_TOKENS <= self.cache.capacity:
            in_steps = self._way.in_steps(n, rates)
        if in_steps:
            assert self._steps is not None
            typical = self._steps.prompt(index, ids[first:], first)
        else:
            for _ in self.hidden(ids, first, index):
                pass
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            typical = n <= self.ubatch
        if self._way is not None and typical:
            seconds, compiling = time.perf_counter() - started, Launched.first_seconds - compiled
            self._way.note(n, in_steps, seconds - compiling, rates)

    def _rates(self) -> PromptRates:
        prompt = self._experts.prompt
        return PromptRates() if prompt is None else prompt.rates

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int], first: int = 0, index: int = 0) -> Iterator[Tensor]:
        """The hidden states f32 `[n, hidden]` of each micro-batch; on a GPU they may not be there yet."""
        self.decoder.await_slots()
        for start in range(first, len(ids), self.ubatch):
            tokens = torch.tensor(ids[start : start + self.ubatch], dtype=torch.int64, device=self.device)
            found = self.model.forward(tokens, start, self.cache.sequence(index), self.rope)
            if self._recorder is not None:
                self._recorder.end_tokens()
            yield found
