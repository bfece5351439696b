"""From a file to what an engine is made of: plan the memory, build the model, allocate slots and KV cache."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.backend import AcceleratorBackend, Backend, CpuBackend, choose_device
from moe_engine.budget import VramPlan, host_bytes, plan_vram
from moe_engine.calibration import Calibration
from moe_engine.calibration import kept as kept_calibration
from moe_engine.config import DEFAULT_CTX, EngineConfig
from moe_engine.errors import ConfigError, ModelFormatError
from moe_engine.expert_cache import CachedExperts
from moe_engine.expert_store import ExpertStore
from moe_engine.experts import CpuExperts, Experts
from moe_engine.gguf_file import GGUFFile
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kv_cache import KVCache
from moe_engine.layers import MixtureOfExperts
from moe_engine.metadata import Metadata
from moe_engine.model import Transformer, n_layer
from moe_engine.model_work import ModelWork
from moe_engine.models import model_class
from moe_engine.placement import placed_homes
from moe_engine.prompt_experts import PromptExperts
from moe_engine.ram_plan import RamPlan, plan_ram
from moe_engine.tokenizer import Tokenizer
from moe_engine.weights import Weights

_log = logging.getLogger("moe_engine")

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to be read)."""


@dataclass(frozen=True)
class Loaded:
    """What an engine is made of."""

    file: GGUFFile
    tokenizer: Tokenizer
    model: Transformer
    experts: Experts
    store: ExpertStore  # of the experts: whoever fails before an engine owns them closes it
    cache: KVCache
    ram_plan: RamPlan  # bytes of experts in RAM and on disk
    vram_plan: VramPlan | None  # how the VRAM budget was divided; None on the CPU


class ModelFile(NamedTuple):
    """A file of a supported architecture."""

    file: GGUFFile
    meta: Metadata
    family: type[Transformer]


def load_model(config: EngineConfig, path: str | Path | None, progress: Progress | None) -> Loaded:
    """All that comes before the engine; without a path, of the bundled model. Raises as `Engine.load`."""
    file, meta, family = open_model(path)
    tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
    ctx = context_of(config, meta)

    device, accelerated = choose_device(config.device)
    held = _start_counting(device)
    if not accelerated and config.experts == "cache":
        raise ConfigError("experts is 'cache', but device 'cpu' has no VRAM: use a CUDA device or 'simulated'")
    if not accelerated and config.vram_budget is not None:
        _log.warning("vram_budget %r has no effect: the model runs on the CPU", config.vram_budget)
    cpu = CpuKernels(config.n_threads, float_activations=config.activations == "float")
    vram = plan_vram(file, meta, family, config, ctx, device) if accelerated else None
    homes = placed_homes(file, config, "cpu", n_layer(meta)) if vram is None else vram.homes
    besides = host_bytes(file, meta, family, config, ctx, device, vram)
    ram = plan_ram(file, meta, n_layer(meta), config, homes, besides, dense_in_ram=not accelerated)
    in_place = not accelerated and ram.holds_all
    store = ExpertStore(file, ram, meta.integer("expert_count"), cpu, device, in_place=in_place)
    backend: Backend = CpuBackend(cpu)
    experts: Experts = CpuExperts(cpu, store)
    if vram is not None:
        backend = AcceleratorBackend(device, vram.scratch_elements, config.activations == "int8")
        experts = CachedExperts(device, backend.scratch, cpu, vram.caches_experts, store, vram.homes)

    def report() -> None:
        if accelerated:
            file.drop_pages()  # what is dense is in VRAM
        if progress is not None:
            progress(*store.progress())

    with store.closed_on_error(), torch.inference_mode():
        model = family(meta, Weights(file, backend), experts, report)
        report()
        store.finish(report)
        _check_tokenizer(tokenizer, model, file)
        cache = KVCache(model.kv_shapes, config.n_sequence, ctx, config.kv_dtype, device)
        if vram is not None and isinstance(experts, CachedExperts):
            _allocate_slots(config, vram, model, experts, _slot_budget(vram, device, held))
            if experts.n_slot and config.activations == "int8":
                experts.prompt = _prompt_experts(config, vram, model, experts, file)
    return Loaded(file, tokenizer, model, experts, store, cache, ram, vram)


def plan_model(config: EngineConfig, path: str | Path | None) -> VramPlan:
    """How the VRAM budget would be divided; without a path, for the bundled model. Raises as `Engine.load`."""
    file, meta, family = open_model(path)
    device, accelerated = choose_device(config.device)
    if not accelerated:
        raise ConfigError("device 'cpu' has no VRAM to plan: use a CUDA device or 'simulated'")
    return plan_vram(file, meta, family, config, context_of(config, meta), device)


# -- what the file says ----------------------------------------------------------------------------------------


def bundled_model() -> Path:
    """The small model that comes with the package."""
    return Path(str(files("moe_engine") / "data" / "stories-deepseek-Q4_K_M.gguf"))


def open_model(path: str | Path | None) -> ModelFile:
    """Without a path, the bundled model. Raises `ModelFormatError` or `UnsupportedModelError`."""
    file = GGUFFile(bundled_model() if path is None else path)
    source = str(file.path)
    family = model_class(file.architecture, source)
    return ModelFile(file, Metadata(file.metadata, file.architecture, source), family)


def context_of(config: EngineConfig, meta: Metadata) -> int:
    """Tokens of context: as configured, or the default. Raises `ConfigError` for more than the model has."""
    trained = meta.integer("context_length")
    if config.ctx is not None and config.ctx > trained:
        raise ConfigError(f"ctx is {config.ctx}, but the model was trained for at most {trained} tokens")
    return config.ctx or min(DEFAULT_CTX, trained)


def _check_tokenizer(tokenizer: Tokenizer, model: Transformer, file: GGUFFile) -> None:
    if tokenizer.n_vocab > model.n_vocab:
        raise ModelFormatError(
            f"{file.path}: the tokenizer has {tokenizer.n_vocab} tokens, but 'token_embd.weight' only "
            f"{model.n_vocab} rows"
        )


# -- what the device has ---------------------------------------------------------------------------------------


def calibration_of(device: torch.device, config: EngineConfig) -> Calibration | None:
    """What `moe-engine calibrate` has kept for this GPU."""
    return kept_calibration(torch.cuda.get_device_name(device), config.n_threads) if device.type == "cuda" else None


def _start_counting(device: torch.device) -> int:
    """Bytes of VRAM that others of this process hold; from here on the peak counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def _slot_budget(plan: VramPlan, device: torch.device, held: int) -> int:
    """Bytes for expert slots and staging: by the plan, or less where loading took more than planned."""
    planned = plan.slots + plan.staging
    if device.type != "cuda":
        return planned
    measured = plan.budget - plan.context - plan.workspace - (torch.cuda.memory_reserved(device) - held)
    return min(planned, measured)


def _allocate_slots(
    config: EngineConfig, plan: VramPlan, model: Transformer, experts: CachedExperts, budget: int
) -> None:
    """Last of all that takes VRAM; budget: bytes."""
    n_choice = min(config.slots_at_once(model.router.top_k), model.router.n_expert)
    if config.exact and plan.caches_experts and (config.cache_slots or n_choice) < n_choice:
        raise ConfigError(f"cache_slots is {config.cache_slots}, but exact needs at least {n_choice}")
    n_stage = config.staging_slots(model.router.top_k)
    experts.allocate(budget, n_choice, config.cache_slots, plan.staging, n_stage)


def _prompt_experts(
    config: EngineConfig, plan: VramPlan, model: Transformer, experts: CachedExperts, file: GGUFFile
) -> PromptExperts:
    routers = [partial(_ids, block.ffn) for block in model.blk if isinstance(block.ffn, MixtureOfExperts)]
    prompt = PromptExperts(experts, plan.ubatch, model.router.top_k, config.exact, routers)
    if calibration := calibration_of(experts.device, config):
        work = ModelWork.of(file, model.meta, type(model), config.kv_dtype)
        prompt.rates = calibration.rates(str(experts.layouts[0].gate.type), work.launches)
    return prompt


def _ids(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    return mixture.choose(x)[0]
