"""The engine: loads a model, and turns prompts into text. Read this file first.

load      file -> weights on their devices -> expert slots -> KV cache
prefill   prompt tokens through the layers in micro-batches
decode    one token at a time: forward, sample, stop?
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moe_engine.budget import LOGIT_BYTES, VramPlan
from moe_engine.config import DEFAULT_UBATCH, EngineConfig, SamplingParams
from moe_engine.decode_step import DecodeStep, Running
from moe_engine.decoder import Decoder, EagerDecoder, StagedDecoder, can_use_step
from moe_engine.errors import CapacityError, ConfigError
from moe_engine.expert_cache import CachedExperts
from moe_engine.generation import Generation, Result
from moe_engine.graph_decoder import GraphDecoder
from moe_engine.hardware import Bound, Hardware, measure
from moe_engine.kernels.sampling_kernel import SamplerState
from moe_engine.layers import MixtureOfExperts
from moe_engine.loading import Loaded, Progress, calibration_of, load_model, plan_model
from moe_engine.placement import is_expert
from moe_engine.prefill import Prefill
from moe_engine.profile import load_profile
from moe_engine.ram_plan import check_loaded
from moe_engine.recording import Recorder
from moe_engine.sampling import Sampler
from moe_engine.stats import Stats, peak_ram_bytes
from moe_engine.traces import TraceModel

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages (`{"role": ..., "content": ...}`), which go through the chat template."""

# Attention of one token over fewer than these is done by one thread of PyTorch on the CPU. Its other threads spin
# after every product, where the kernels' threads want to run, and wait for each other while other programs run.
SHORT_CONTEXT = 256


class Engine:
    """A loaded model. Use as a context manager, or call `close` when done. Not safe for use by several threads.

    One generation at a time: when another one begins, or `forward` or `read`, an unfinished stream is over.

    >>> with Engine.load() as engine:
    ...     result = engine.generate("Once upon a time", max_tokens=32, seed=7)
    """

    def __init__(self, config: EngineConfig, loaded: Loaded) -> None:
        """Use `Engine.load`."""
        model, experts, cache, vram_plan = loaded.model, loaded.experts, loaded.cache, loaded.vram_plan
        self.config, self.file, self.tokenizer = config, loaded.file, loaded.tokenizer
        self.model, self.experts, self.cache = model, experts, cache
        self.ram_plan, self.vram_plan = loaded.ram_plan, vram_plan
        self.rope = model.make_rope(cache.capacity)
        self.recorder = self._recorder() if config.trace is not None else None
        self.device = model.output_norm.device
        self._in_cache: list[list[int]] = [[] for _ in range(cache.n_sequence)]  # tokens of each KV cache
        self._turn, self._closed = 0, False  # who has taken the KV cache last
        self.decoder = self._start_decoder()
        ubatch = vram_plan.ubatch if vram_plan is not None else config.ubatch or DEFAULT_UBATCH
        self.prefill = Prefill(model, experts, cache, self.rope, self.decoder, ubatch, self.recorder)
        if not config.exact:  # results may depend on how long things take
            self.prefill.learn_ways()

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Loads a GGUF file; without a path, the bundled model.

        options: the fields of `EngineConfig`. progress: called with (bytes read, bytes to be read).
        Raises `ModelFormatError` or `UnsupportedModelError` for the file, `ConfigError` for an option,
        `CapacityError` when the memory does not suffice.
        """
        config = EngineConfig.of(**options)
        loaded = load_model(config, path, progress)
        with loaded.store.closed_on_error(), torch.inference_mode():
            engine = cls(config, loaded)
            try:
                check_loaded(loaded.ram_plan, config, loaded.store.on_demand_bytes)
            except CapacityError:
                engine.close()
                raise
            return engine

    @staticmethod
    def plan(path: str | Path | None = None, **options: Any) -> VramPlan:
        """How a VRAM budget would be divided, without loading anything. Raises as `load`."""
        return plan_model(EngineConfig.of(**options), path)

    def _recorder(self) -> Recorder:
        """Writes the routing of all MoE layers to the trace file."""
        assert self.config.trace is not None
        mixtures = [block.ffn for block in self.model.blk if isinstance(block.ffn, MixtureOfExperts)]
        if not mixtures:
            raise ConfigError(f"trace is '{self.config.trace}', but {self.file.path} has no mixture of experts")
        router = self.model.router
        model = TraceModel(self.file.architecture, len(mixtures), router.n_expert, router.top_k, self.fingerprint)
        recorder = Recorder(self.config.trace, model)
        for mixture in mixtures:
            mixture.on_route = recorder.note_layer
        return recorder

    def _start_decoder(self) -> Decoder:
        """The fastest that can run the model here."""
        config, experts, cache, tokenizer = self.config, self.experts, self.cache, self.tokenizer
        decoder: Decoder
        if isinstance(experts, CachedExperts) and can_use_step(config, self.model):
            sampler = SamplerState(cache.n_sequence, tokenizer.n_vocab, self.device, tokenizer.suppress_ids)
            step = DecodeStep(self.model, experts, cache, self.rope, sampler)
            if not config.eager:  # it fills the slots meanwhile
                profile = load_profile(self.fingerprint, *experts.slot_table.shape) if config.profile else None
                return GraphDecoder.start(step, config, self.recorder, profile)
            decoder = StagedDecoder(step, self.recorder)
        else:
            decoder = EagerDecoder(self._decode_step, experts)
        experts.fill()  # prompts use them
        return decoder

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart, whatever their files are called."""
        return self.file.fingerprint()

    # -- text --------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **sampling: Any) -> Result:
        """Continues the prompt. sampling: the fields of `SamplingParams`.

        Raises `ConfigError` for a bad option or prompt, `CapacityError` if the prompt exceeds the context.
        """
        return self.stream(prompt, **sampling).result()

    def stream(self, prompt: Prompt, **sampling: Any) -> Generation:
        """As `generate`, but returns an iterator over pieces of text; its `result()` has the totals."""
        return self._generation(prompt, SamplingParams.of(**sampling))

    def generate_batch(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Result]:
        """Continues several prompts, which decode together; at most `n_sequence` of them. Results share their `stats`.

        Raises as `generate`; `ConfigError` for too many prompts.
        """
        if isinstance(prompts, str):
            raise ConfigError("generate_batch got one text, expected a list of prompts")
        if not prompts:
            return []
        if len(prompts) > self.cache.n_sequence:
            raise ConfigError(
                f"{len(prompts)} prompts, but the engine was loaded for {self.cache.n_sequence}: raise n_sequence"
            )
        generations = [self._generation(prompt, SamplingParams.of(**sampling)) for prompt in prompts]
        for _ in self._decode(generations):
            pass
        return [generation.so_far() for generation in generations]

    def _generation(self, prompt: Prompt, params: SamplingParams) -> Generation:
        return Generation(self.tokenizer, self.encode(prompt), params, isinstance(prompt, str), self._decode)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around it."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif not isinstance(prompt, Sequence):
            raise ConfigError(f"the prompt is {prompt!r}, expected text, token ids or chat messages")
        elif prompt and all(isinstance(message, Mapping) for message in prompt):
            ids = self.tokenizer.chat_prompt(prompt)  # type: ignore[arg-type]
        else:
            ids = self._checked_ids(prompt)  # type: ignore[arg-type]
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]  # something has to start an unprompted text
        if not ids:
            raise ConfigError("the prompt is empty and the model has no start token: give at least one token")
        return ids

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Logits f32 `[n_token, n_vocab]` (on the CPU) after each of the tokens, from an empty context."""
        ids = self._checked_ids(token_ids)
        self._check_fits(ids)
        self._take_turn()
        self._in_cache[0] = []
        return torch.cat([self._logits(hidden) for hidden in self.prefill.hidden(ids)])

    def read(self, token_ids: Sequence[int]) -> None:
        """Runs tokens through the layers from an empty context, for the trace that is recorded."""
        ids = self._checked_ids(token_ids)
        self._check_fits(ids)
        self._take_turn()
        self._in_cache[0] = []
        self.prefill(ids)
        if self.recorder is not None:
            self.recorder.flush()

    # -- tokens ------------------------------------------------------------------------------------------------

    def _decode(self, generations: Sequence[Generation]) -> Iterator[None]:
        """Prefill, then decode until each generation is done. Yields whenever all have been given a token.

        The last token of a prompt is the first that decodes, so none is computed twice when more follow.
        """
        turn = self._take_turn()
        clock, stats = _Clock(), Stats()
        prompt = self.experts.prompt
        before = replace(prompt.counts) if prompt is not None else None
        running = []
        for index, generation in enumerate(generations):
            generation.stats = stats
            sampler = Sampler(generation.params, self.tokenizer.suppress_ids)
            running.append(Running(list(generation.prompt_tokens), generation.params, sampler))
            self._prompt(index, generation.prompt_tokens, stats)
        stats.prompt_seconds = clock.lap()
        if prompt is not None and before is not None:
            stats.prompt_experts = prompt.counts.since(before)
        active = [index for index, generation in enumerate(generations) if not generation.done]
        room = self.cache.capacity + 1 - min(len(sequence.tokens) for sequence in running)
        self.decoder.begin(running, min(room, max(generation.params.max_tokens for generation in generations)))
        self.decoder.reset_stats()
        if not active:
            self._complete(stats, running)
        while active:
            tokens = self.decoder.next()
            for index in active:
                sequence, generation = running[index], generations[index]
                self._in_cache[index].append(sequence.tokens[-1])
                sequence.tokens.append(tokens[index])
                generation.accept(tokens[index], full=len(sequence.tokens) > self.cache.capacity)
                if generation.done:
                    self.decoder.drop(index)
            stats.decode_tokens += len(active)
            stats.decode_seconds += clock.lap()
            active = [index for index in active if not generations[index].done]
            if not active:
                self._complete(stats, running)
            yield
            if active and turn != self._turn:
                raise ConfigError("this stream is over: its engine has begun something else, or is closed")
            clock.lap()  # what the caller did meanwhile is not ours

    def _take_turn(self) -> int:
        """Of whoever is about to change the KV cache."""
        self._check_open()
        self._turn += 1
        if self.recorder is not None:
            self.recorder.begin()
        return self._turn

    def _prompt(self, index: int, ids: list[int], stats: Stats) -> None:
        """Brings all but the last token of a prompt into a sequence's KV cache, unless they are there."""
        self._check_fits(ids)
        before = self._in_cache[index]
        reused = min(_common_prefix(ids, before), len(ids) - 1)
        stats.prompt_tokens += len(ids)
        stats.reused_tokens += reused
        stats.prefilled_tokens += len(ids) - 1 - reused
        self._in_cache[index] = ids[:reused]
        self.prefill(ids[:-1], reused, index)
        self._in_cache[index] = ids[:-1]

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits f32 `[n, n_vocab]` on the CPU, computed in chunks of bounded size."""
        chunk = max(1, LOGIT_BYTES // (4 * self.model.n_vocab))
        return torch.cat([self.model.logits(rows).cpu() for rows in hidden.split(chunk)])

    @torch.inference_mode()
    def _decode_step(self, index: int, token: int, position: int) -> Tensor:
        """Logits f32 `[n_vocab]` (tokens only, without padding) after a sequence's `token` at `position`."""
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and position < SHORT_CONTEXT:
            torch.set_num_threads(1)
        try:
            tokens = torch.tensor([token], device=self.device)
            hidden = self.model.forward(tokens, position, self.cache.sequence(index), self.rope)
            if self.recorder is not None:
                self.recorder.end_tokens()
            return self._logits(hidden)[0, : self.tokenizer.n_vocab]
        finally:
            torch.set_num_threads(threads)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the engine is closed: load it again")

    def _check_fits(self, ids: Sequence[int]) -> None:
        if len(ids) > self.cache.capacity:
            raise CapacityError(
                f"{len(ids)} tokens do not fit the context of {self.cache.capacity}: shorten them or raise ctx"
            )

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        self._check_open()
        checked = []
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.model.n_vocab:
                raise ConfigError(f"token id {token!r}: expected an integer from 0 to {self.model.n_vocab - 1}")
            checked.append(token)
        if not checked:
            raise ConfigError("no tokens given: expected at least one")
        return checked

    # -- what it cost ------------------------------------------------------------------------------------------

    def _complete(self, stats: Stats, running: Sequence[Running]) -> None:
        """Adds what a whole generation has cost."""
        self.decoder.count(stats)
        if self.recorder is not None:
            self.recorder.flush()
        stats.peak_vram_bytes, stats.peak_ram_bytes = self._peak_vram_bytes(), peak_ram_bytes()
        if stats.steps:
            middle = sum(len(sequence.tokens) for sequence in running) - stats.decode_tokens / 2
            stats.dense_bytes = stats.steps * int(self.dense_bytes + middle * self.cache.token_bytes)
            per_step = (stats.dense_bytes + stats.hit_bytes) / stats.steps, stats.miss_bytes / stats.steps
            stats.bound = Bound.of(self.hardware, *per_step, stats.decode_seconds / stats.steps)

    @cached_property
    def dense_bytes(self) -> int:
        """Weights that every decode step reads."""
        embedding = "token_embd.weight"
        read = (info for info in self.file.tensors.values() if not is_expert(info.name) and info.name != embedding)
        tied = 0 if "output.weight" in self.file.tensors else self.file.tensors[embedding].nbytes
        return sum(info.nbytes for info in read) + tied

    @cached_property
    def hardware(self) -> Hardware:
        """What the memories deliver: as calibrated, or else measured at the first use, in about half a second."""
        calibration = calibration_of(self.device, self.config)
        return measure(self.device, self.experts.cpu) if calibration is None else calibration.hardware

    def _peak_vram_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    # -- lifetime ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the weights and caches. The engine cannot be used afterwards."""
        self._turn, self._closed = self._turn + 1, True
        with ExitStack() as rest:  # all of it, whatever fails
            rest.callback(self._forget)
            if "decoder" not in self.__dict__:
                return
            rest.callback(self.experts.close)
            rest.callback(self.decoder.close)
            if self.recorder is not None:
                rest.callback(self.recorder.close)
            if self.config.profile and isinstance(self.decoder, GraphDecoder):
                use = self.decoder.use_of_experts(self.fingerprint)
                if use is not None:
                    use.save()

    def _forget(self) -> None:
        for name in ("prefill", "decoder", "model", "experts", "cache", "rope", "file"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Clock:
    """Wall-clock laps. The device is done with them at their ends: it was waited for, or tokens are on the CPU."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
