"""Divides the VRAM budget before anything is loaded: what must fit, and what is left for expert slots."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_engine.config import DEFAULT_UBATCH, EngineConfig, format_size, parse_size
from moe_engine.errors import CapacityError, ConfigError
from moe_engine.gguf_file import GGUFFile
from moe_engine.kernels.attention import SCORE_BYTES
from moe_engine.kernels.grouped_expand import at_once
from moe_engine.kernels.slot_layout import aligned
from moe_engine.kv_cache import cached_bytes
from moe_engine.metadata import Metadata
from moe_engine.model import Transformer, n_layer
from moe_engine.placement import Home, block_of, is_expert, placed_homes, uses_slots

CUDA_CONTEXT_BYTES = 704 << 20  # seen: 689 MiB on an H200, CUDA 13 (bench/results/check_gpu.json)
DEFAULT_SHARE = 0.9  # of the free VRAM, when no budget is given
SIMULATED_BYTES = 1 << 30  # the default budget of the simulated device
LOGIT_BYTES = 64 << 20  # one chunk of logits
GRAPH_BYTES = 160 << 20  # for the captured steps of a model
ATTENTION_BYTES = 16 << 20  # partial results of one token's attention over splits of the context
STAGING_BYTES = 384 << 20  # for experts on their way to the GPU in prompts
STAGING_SHARE = 0.25  # of what is left for experts: the most that staging takes
UBATCHES = (16384, 8192, 4096, 2048, 1024)  # to choose from; a prompt streams the experts once per micro-batch
WORKSPACE_SHARE = 0.2  # of what is left for experts: the most that a larger micro-batch than the default takes
LEAST_CTX, LEAST_UBATCH = 256, 32  # that are suggested where something does not fit
SCRATCH_ELEMENTS = 16 << 20  # one chunk of dequantized weights: 64 MiB keep a 7168-wide matrix to few chunks


@dataclass(frozen=True)
class VramPlan:
    """Bytes by purpose; `slots` is what is left of `budget` for experts. ubatch: tokens of a micro-batch."""

    budget: int
    context: int
    dense: int
    placed: int  # experts that are in VRAM for good
    kv_cache: int
    workspace: int
    staging: int
    ubatch: int
    caches_experts: bool
    homes: Mapping[int, Home]  # of placed layers' experts, by block
    scratch_elements: int  # f32 values of dequantized weights held at once, part of the workspace

    @property
    def slots(self) -> int:
        taken = self.context + self.dense + self.placed + self.kv_cache + self.workspace + self.staging
        return self.budget - taken

    def needed(self, least: int) -> int:
        """Of the whole, with slots and staging of `least` bytes."""
        return self.budget - self.slots + (least if self.caches_experts else 0)

    @property
    def terms(self) -> dict[str, int]:
        """Bytes of everything but the slots."""
        return {
            "CUDA context": self.context,
            "dense weights": self.dense,
            **({"placed experts": self.placed} if self.placed else {}),
            "KV cache": self.kv_cache,
            "workspace": self.workspace,
            "staging ring": self.staging,
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in self.terms.items())


def plan_vram(
    file: GGUFFile,
    meta: Metadata,
    family: type[Transformer],
    config: EngineConfig,
    ctx: int,
    device: torch.device,
    memory: tuple[int, int] | None = None,
) -> VramPlan:
    """Raises `CapacityError`, with the terms and what would fit, when the model does not; `ConfigError` for a bad
    budget. memory: free and total VRAM, where the device is not at hand.
    """
    budget = _budget(config, device, memory)
    plan, least, least_staging = _divide(file, meta, family, config, ctx, device, budget)
    needed = plan.needed(least)
    if needed > plan.budget:
        slots = f", slots for one token's experts {format_size(least)}" if plan.caches_experts else ""

        def fits(ctx: int, **changes: Any) -> bool:
            other, least, _ = _divide(file, meta, family, replace(config, **changes), ctx, device, budget)
            return other.needed(least) <= budget

        raise CapacityError(
            f"{file.path} needs at least {format_size(needed)} of VRAM ({plan}{slots}), but the budget is "
            f"{format_size(plan.budget)}. What would do: {', or '.join(_remedies(needed, config, ctx, fits))}"
        )
    if plan.caches_experts:
        plan = replace(plan, staging=max(least_staging, min(STAGING_BYTES, int(STAGING_SHARE * plan.slots))))
    return plan


def host_bytes(
    file: GGUFFile,
    meta: Metadata,
    family: type[Transformer],
    config: EngineConfig,
    ctx: int,
    device: torch.device,
    vram: VramPlan | None,
) -> int:
    """What a loaded model takes in RAM besides its weights: KV cache and a micro-batch on the CPU, where that is plain
    f32; what passes for VRAM on the simulated device, whose weights count there.
    """
    if vram is not None:
        return vram.budget if device.type == "cpu" else 0
    n_token, plain = min(config.ubatch or DEFAULT_UBATCH, ctx), replace(config, activations="float")
    return _kv_bytes(meta, family, config, ctx) + _workspace_bytes(file, meta, family, plain, n_token, ctx)


def _remedies(needed: int, config: EngineConfig, ctx: int, fits: Callable[..., bool]) -> list[str]:
    """Single changes with which the model fits. fits: of a ctx and changes of the configuration."""
    found = [f"vram_budget {-(-needed >> 20)}MiB"]
    halves = range(1, 16)
    smaller = next((n for n in (ctx >> shift for shift in halves) if n >= LEAST_CTX and fits(n)), None)
    if smaller is not None:
        found.append(f"ctx {smaller}")
    ubatch = config.ubatch or DEFAULT_UBATCH
    sizes = (n for n in (ubatch >> shift for shift in halves) if n >= LEAST_UBATCH and fits(ctx, ubatch=n))
    fewer = next(sizes, None)
    if fewer is not None:
        found.append(f"ubatch {fewer}")
    if config.n_sequence > 1 and fits(ctx, n_sequence=1):
        found.append("n_sequence 1")
    if config.experts == "cache" and not config.exact and fits(ctx, experts="cpu"):
        found.append("experts 'cpu'")
    return [*found, "device 'cpu'"]


def _divide(
    file: GGUFFile,
    meta: Metadata,
    family: type[Transformer],
    config: EngineConfig,
    ctx: int,
    device: torch.device,
    budget: int,
) -> tuple[VramPlan, int, int]:
    """A plan without staging, whether it fits or not; and bytes: of slots and staging at least, and of the latter."""
    matrices = [torch.Size(info.shape[-2:]).numel() for info in file.tensors.values() if len(info.shape) > 1]
    scratch_elements = min(SCRATCH_ELEMENTS, max(matrices, default=1))
    name = "simulated" if device.type == "cpu" else f"cuda:{device.index or 0}"
    homes = placed_homes(file, config, name, n_layer(meta))
    least_slots, least_staging = _least_bytes(file, meta, config, homes)

    def divided(ubatch: int) -> VramPlan:
        return VramPlan(
            budget=budget,
            context=CUDA_CONTEXT_BYTES if device.type == "cuda" else 0,
            dense=_dense_bytes(file, meta),
            placed=_placed_bytes(file, homes),
            kv_cache=_kv_bytes(meta, family, config, ctx),
            workspace=4 * scratch_elements
            + _workspace_bytes(file, meta, family, config, min(ubatch, ctx), ctx)
            + _decode_bytes(file, config, device),
            staging=0,
            ubatch=min(ubatch, ctx),
            caches_experts=config.experts != "cpu",
            homes=homes,
            scratch_elements=scratch_elements,
        )

    plan = divided(config.ubatch or DEFAULT_UBATCH)
    if config.ubatch is None and config.activations != "float":
        candidates = (divided(ubatch) for ubatch in UBATCHES)
        most = plan.workspace + WORKSPACE_SHARE * plan.slots
        plan = next((found for found in candidates if found.workspace <= most), plan)
    least = least_slots + least_staging
    if config.experts == "auto" and plan.slots < least:
        plan = replace(plan, caches_experts=False)
    return plan, least, least_staging


def _budget(config: EngineConfig, device: torch.device, memory: tuple[int, int] | None) -> int:
    if device.type != "cuda":
        return SIMULATED_BYTES if config.vram_budget is None else parse_size(config.vram_budget)
    free, total = memory or torch.cuda.mem_get_info(device)
    if config.vram_budget is None:
        return int(free * DEFAULT_SHARE) + CUDA_CONTEXT_BYTES
    budget = parse_size(config.vram_budget)
    if budget > total:
        raise ConfigError(f"vram_budget is {format_size(budget)}, but the device has {format_size(total)}")
    return budget


def _dense_bytes(file: GGUFFile, meta: Metadata) -> int:
    """What is not a routed expert stays in VRAM as the file holds it; small tensors are expanded to f32."""
    skipped = tuple(f"blk.{i}." for i in range(n_layer(meta), meta.integer("block_count")))
    total = 0
    for info in file.tensors.values():
        if is_expert(info.name) or info.name.startswith(skipped or ("\0",)):
            continue
        total += info.nbytes
        if ".attn_kv_b." in info.name:  # old MLA files: the keys' part is expanded to f32
            total += 4 * torch.Size(info.shape).numel()
    return total


def _placed_bytes(file: GGUFFile, homes: Mapping[int, Home]) -> int:
    """Slots for all experts of the layers that are in VRAM for good."""
    experts = (info for info in file.tensors.values() if is_expert(info.name))
    placed = (info for info in experts if homes.get(block_of(info.name)) == "vram")
    return sum(info.shape[0] * aligned(info.nbytes // info.shape[0]) for info in placed)


def _least_bytes(file: GGUFFile, meta: Metadata, config: EngineConfig, homes: Mapping[int, Home]) -> tuple[int, int]:
    """The slots that every shared pool needs at least, and the staging slots (see expert_cache.py)."""
    top_k, n_expert = meta.integer("expert_used_count"), meta.integer("expert_count")
    layers: dict[str, list[tuple[str, int, int]]] = {}
    for info in file.tensors.values():
        if is_expert(info.name) and uses_slots(homes.get(block_of(info.name), "cache")):
            block, part = info.name.rsplit(".", 2)[0], info.name.rsplit(".", 2)[1]
            layers.setdefault(block, []).append((part, info.type_id, info.nbytes // n_expert))
    pools = {tuple(sorted(parts)) for parts in layers.values()}
    slots = [sum(aligned(nbytes) for _, _, nbytes in parts) for parts in pools]
    staging = config.staging_slots(top_k) * max(slots, default=0)
    return min(config.slots_at_once(top_k), n_expert) * sum(slots), staging


def _kv_bytes(meta: Metadata, family: type[Transformer], config: EngineConfig, ctx: int) -> int:
    return config.n_sequence * n_layer(meta) * ctx * cached_bytes(config.kv_dtype, family.kv_values(meta))


def _decode_bytes(file: GGUFFile, config: EngineConfig, device: torch.device) -> int:
    """What captured decode steps hold: PyTorch's pool for their tensors, and the graphs themselves."""
    if config.eager or device.type != "cuda":
        return 0
    embedding = file.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding is not None else 0
    return GRAPH_BYTES + ATTENTION_BYTES + config.n_sequence * (32 * n_vocab + ATTENTION_BYTES)  # prompt steps, others


def _workspace_bytes(
    file: GGUFFile, meta: Metadata, family: type[Transformer], config: EngineConfig, n_token: int, ctx: int
) -> int:
    """An upper estimate of what one micro-batch holds at once."""
    hidden, top_k = meta.integer("embedding_length"), meta.integer("expert_used_count")
    experts = [info.shape for info in file.tensors.values() if is_expert(info.name) and len(info.shape) == 3]
    n_expert, n_ff = max(((shape[0], min(shape[1:])) for shape in experts), default=(0, 0))
    widest = max(
        (info.shape[-2] for info in file.tensors.values() if len(info.shape) == 2 and info.name.startswith("blk.")),
        default=0,
    )
    per_token = 4 * 6 * hidden + 2 * 4 * widest + 2 * top_k * (n_ff + hidden)
    if config.activations == "float":
        per_token = 4 * (12 * hidden + 6 * widest) + 2 * top_k * (n_ff + 5 * hidden)
    embedding = file.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding is not None else 0  # loading reports the missing tensor
    scores = min(SCORE_BYTES, 4 * meta.integer("attention.head_count") * n_token * ctx)
    scores = scores if config.activations == "float" else 0  # else there is no matrix of them
    logits = min(LOGIT_BYTES, 4 * n_vocab * n_token)
    gate_up = 2 * n_ff * hidden
    expanded = 2 * gate_up * at_once(n_expert, gate_up) if config.activations != "float" else 0
    chunks = 3 * scores + 2 * logits + expanded
    return per_token * n_token + family.attention_bytes(meta, n_token, ctx, config) + chunks
