"""The engine: loads a model, and turns prompts into text. Read this file first.

load      file -> weights on their devices -> expert slots -> KV cache
prefill   prompt tokens through the layers in micro-batches
decode    one token at a time: forward, sample, stop?
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from moe_engine.backend import AcceleratorBackend, Backend, CpuBackend, choose_device
from moe_engine.budget import LOGIT_BYTES, VramPlan, plan_vram
from moe_engine.config import EngineConfig, SamplingParams
from moe_engine.errors import CapacityError, ConfigError, ModelFormatError
from moe_engine.expert_cache import CachedExperts
from moe_engine.experts import CpuExperts, Experts
from moe_engine.gguf_file import GGUFFile
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kv_cache import KVCache
from moe_engine.metadata import Metadata
from moe_engine.model import Transformer
from moe_engine.models import model_class
from moe_engine.sampling import Sampler
from moe_engine.stats import Stats, peak_ram_bytes
from moe_engine.tokenizer import Tokenizer
from moe_engine.weights import Weights

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages (`{"role": ..., "content": ...}`), which go through the chat template."""

DEFAULT_CTX = 4096

# Attention of one token over fewer than these is done by one thread of PyTorch on the CPU. Its other threads spin
# after every product, where the kernels' threads want to run, and wait for each other while other programs run.
SHORT_CONTEXT = 256


def bundled_model() -> Path:
    """The small model that comes with the package."""
    return Path(str(files("moe_engine") / "data" / "stories-deepseek-Q4_K_M.gguf"))


@dataclass(frozen=True)
class Result:
    """A finished generation. `tokens` are the generated ones, without the one that stopped it."""

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: Literal["stop", "length"]
    stats: Stats


class Engine:
    """A loaded model. Use as a context manager, or call `close` when done. Not safe for use by several threads.

    >>> with Engine.load() as engine:
    ...     result = engine.generate("Once upon a time", max_tokens=32, seed=7)
    """

    def __init__(
        self,
        config: EngineConfig,
        file: GGUFFile,
        tokenizer: Tokenizer,
        model: Transformer,
        experts: Experts,
        cache: KVCache,
        vram_plan: VramPlan | None,
    ) -> None:
        """Use `Engine.load`. vram_plan: how the VRAM budget was divided, None on the CPU."""
        self.config, self.file, self.tokenizer, self.experts = config, file, tokenizer, experts
        self.model, self.cache, self.vram_plan = model, cache, vram_plan
        self.rope = model.make_rope(cache.capacity)
        self.device = model.output_norm.device

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Self:
        """Loads a GGUF file; without a path, the bundled model.

        options: the fields of `EngineConfig`. progress: called with (layers loaded, layers in all).
        Raises `ModelFormatError` or `UnsupportedModelError` for the file, `ConfigError` for an option,
        `CapacityError` when the memory does not suffice.
        """
        config = EngineConfig.of(**options)
        file = GGUFFile(bundled_model() if path is None else path)
        source = str(file.path)
        family = model_class(file.architecture, source)
        meta = Metadata(file.metadata, file.architecture, source)
        tokenizer = Tokenizer.from_metadata(file.metadata, source)
        ctx = _context(config, meta)

        device, accelerated = choose_device(config.device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if not accelerated and config.experts == "cache":
            raise ConfigError("experts is 'cache', but device 'cpu' has no VRAM: use a CUDA device or 'simulated'")
        cpu = CpuKernels(config.n_threads, float_activations=config.activations == "float")
        backend: Backend = CpuBackend(cpu)
        experts: Experts = CpuExperts(cpu)
        plan = None
        if accelerated:
            plan = plan_vram(file, meta, family, config, ctx, device)
            int8_activations = config.activations == "int8"
            backend = AcceleratorBackend(device, plan.scratch_elements, int8_activations)
            if plan.caches_experts:
                experts = CachedExperts(device, backend.scratch, int8_activations)
        with torch.inference_mode():
            model = family(meta, Weights(file, backend), experts, progress)
            if tokenizer.n_vocab > model.n_vocab:
                raise ModelFormatError(
                    f"{source}: the tokenizer has {tokenizer.n_vocab} tokens, but 'token_embd.weight' only "
                    f"{model.n_vocab} rows"
                )
            cache = KVCache(model.kv_shapes, ctx, config.kv_dtype, device)
            if plan is not None and isinstance(experts, CachedExperts):
                experts.allocate(_slot_budget(plan, device), model.router.top_k, config.cache_slots)
            return cls(config, file, tokenizer, model, experts, cache, plan)

    # -- text --------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **sampling: Any) -> Result:
        """Continues the prompt. sampling: the fields of `SamplingParams`.

        Raises `ConfigError` for a bad option or prompt, `CapacityError` if the prompt exceeds the context.
        """
        return self.stream(prompt, **sampling).result()

    def stream(self, prompt: Prompt, **sampling: Any) -> "Generation":
        """As `generate`, but returns an iterator over pieces of text; its `result()` has the totals."""
        return Generation(self, self.encode(prompt), SamplingParams.of(**sampling), isinstance(prompt, str))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around it."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
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
        return torch.cat([self._logits(hidden) for hidden in self._prefill(ids)])

    # -- tokens ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _prefill(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Runs tokens from position 0 on; yields the hidden states `[n, hidden]` of each micro-batch."""
        if len(ids) > self.cache.capacity:
            raise CapacityError(
                f"{len(ids)} tokens do not fit the context of {self.cache.capacity}: shorten them or raise ctx"
            )
        for start in range(0, len(ids), self.config.ubatch):
            yield self._forward(ids[start : start + self.config.ubatch], start)

    def _forward(self, ids: Sequence[int], position: int) -> Tensor:
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.device)
        return self.model.forward(tokens, position, self.cache, self.rope)

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits f32 `[n, n_vocab]` on the CPU, computed in chunks of bounded size."""
        chunk = max(1, LOGIT_BYTES // (4 * self.model.n_vocab))
        return torch.cat([self.model.logits(rows).cpu() for rows in hidden.split(chunk)])

    @torch.inference_mode()
    def _decode_step(self, token: int, position: int) -> Tensor:
        """Logits f32 `[n_vocab]` after `token` at `position`."""
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and position < SHORT_CONTEXT:
            torch.set_num_threads(1)
        try:
            return self._logits(self._forward([token], position))[0]
        finally:
            torch.set_num_threads(threads)

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        checked = []
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.model.n_vocab:
                raise ConfigError(f"token id {token!r}: expected an integer from 0 to {self.model.n_vocab - 1}")
            checked.append(token)
        if not checked:
            raise ConfigError("no tokens given: expected at least one")
        return checked

    # -- lifetime ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the weights and caches. The engine cannot be used afterwards."""
        for name in ("model", "experts", "cache", "rope", "file"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Generation:
    """A running generation: iterate for pieces of text (never half a character), then ask for `result()`."""

    def __init__(self, engine: Engine, prompt_tokens: list[int], params: SamplingParams, continues_text: bool) -> None:
        """Use `Engine.stream`. continues_text: a space before the first word belongs to the text."""
        self.prompt_tokens, self.tokens = prompt_tokens, list[int]()
        self.stats = Stats(prompt_tokens=len(prompt_tokens))
        self.finish_reason: Literal["stop", "length"] = "length"
        self._engine, self._params, self._continues_text = engine, params, continues_text
        self._text: list[str] = []
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._text.append(piece)
        return piece

    def result(self) -> Result:
        """The finished generation; runs it to its end if it has not been iterated."""
        for _ in self:
            pass
        return Result("".join(self._text), self.tokens, self.prompt_tokens, self.finish_reason, self.stats)

    def _run(self) -> Iterator[str]:
        """Tokens to text, cut at the first stop string."""
        text = self._engine.tokenizer.stream(continuation=self._continues_text)
        held = ""  # text that may be the beginning of a stop string
        for token in self._generate():
            held += text.push(token)
            cut = min((i for stop in self._params.stop if (i := held.find(stop)) >= 0), default=-1)
            if cut >= 0:
                self.finish_reason = "stop"
                if held[:cut]:
                    yield held[:cut]
                return
            safe = len(held) - _overlap(held, self._params.stop)
            if safe:
                yield held[:safe]
            held = held[safe:]
        if held := held + text.flush():
            yield held

    def _generate(self) -> Iterator[int]:
        """Prefill, then decode until a stop token, `max_tokens` or the end of the context."""
        engine, params, ids = self._engine, self._params, self.prompt_tokens
        sampler = Sampler(params, engine.tokenizer.suppress_ids)
        hits, misses = engine.experts.hits, engine.experts.misses
        clock = _Clock(engine.device)
        for hidden in engine._prefill(ids):
            last_hidden = hidden[-1:]
        logits = engine._logits(last_hidden)[0]
        self.stats.prompt_seconds = clock.lap()
        while len(self.tokens) < params.max_tokens:
            # Models may have more rows than tokens: the rest is padding that must not be drawn.
            token = sampler(logits[: engine.tokenizer.n_vocab], [*ids, *self.tokens])
            if token in engine.tokenizer.stop_ids:
                self.finish_reason = "stop"
                break
            self.tokens.append(token)
            position = len(ids) + len(self.tokens) - 1
            last = len(self.tokens) == params.max_tokens or position == engine.cache.capacity
            if not last:
                logits = engine._decode_step(token, position)
                self.stats.decode_tokens += 1
            self.stats.decode_seconds += clock.lap()
            self.stats.expert_hits = engine.experts.hits - hits
            self.stats.expert_misses = engine.experts.misses - misses
            self.stats.peak_vram_bytes, self.stats.peak_ram_bytes = clock.peak_vram_bytes(), peak_ram_bytes()
            yield token
            clock.lap()  # what the caller did meanwhile is not ours
            if last:
                break


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


class _Clock:
    """Wall-clock laps that wait for the device, and its peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.last = time.perf_counter()

    def lap(self) -> float:
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed

    def peak_vram_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.cuda) if self.cuda is not None else 0


def _slot_budget(plan: VramPlan, device: torch.device) -> int:
    """Bytes for expert slots: by the plan, or less where loading took more than planned."""
    if device.type != "cuda":
        return plan.slots
    measured = plan.budget - plan.context - plan.workspace - torch.cuda.memory_reserved(device)
    return min(plan.slots, measured)


def _context(config: EngineConfig, meta: Metadata) -> int:
    trained = meta.integer("context_length")
    if config.ctx is not None and config.ctx > trained:
        raise ConfigError(f"ctx is {config.ctx}, but the model was trained for at most {trained} tokens")
    return config.ctx or min(DEFAULT_CTX, trained)
