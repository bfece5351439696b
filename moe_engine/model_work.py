"""What a model has to read and multiply for a token, from the header of its file."""

from collections import Counter
from dataclasses import dataclass

from moe_engine.budget import SCRATCH_ELEMENTS
from moe_engine.gguf_file import GGUFFile
from moe_engine.gguf_part import TensorInfo
from moe_engine.kernels.slot_layout import aligned
from moe_engine.kv_cache import cached_bytes
from moe_engine.metadata import MAX_EXPERTS, Metadata
from moe_engine.model import Transformer, n_layer
from moe_engine.placement import block_of, is_expert

# Kernels of a captured decode step, see decode_step.py and the `decode` of the attentions
ATTENTION_KERNELS = 6  # norm; q, k, v; rotation and append; attention (2); output
LATENT_KERNELS = 8  # norm; q, kv; latent norm, rotation and append; queries to latents; attention (2); values; output
LOW_RANK_QUERY_KERNELS = 2
FEED_FORWARD_KERNELS = 3  # norm; gate and up; down
MIXTURE_KERNELS = 3  # norm; router (2)
SHARED_KERNELS = 4  # its slot and weight; gate and up; down
HIT_KERNELS = 2  # gate and up; down
HEAD_KERNELS = 5  # embedding, norm, product, sampling, record
SLICE_KERNELS = 1  # writing weights out and multiplying are prepared, and take half as long to launch as others
CALIBRATED_KERNELS = 11  # of a layer of Qwen3-30B-A3B, with which calibration measures the host


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of a block: of one expert, bytes in a slot, bytes by type, and weights."""

    block: int
    nbytes: int
    by_type: dict[str, int]
    n_weight: int


@dataclass(frozen=True)
class ModelWork:
    """Of the whole model, per decode step unless it says otherwise."""

    n_block: int
    n_expert: int
    top_k: int
    experts: tuple[ExpertLayer, ...]
    dense: dict[str, int]  # bytes that are read, by type
    prompt_weights: int  # that each token of a prompt is multiplied with; the head is not needed
    prompt_dense: dict[str, int]  # bytes of these
    activation_bytes: int  # that a prompt's token reads and writes as inputs and outputs of products
    attention_operations: int  # of one query with one key, all heads and blocks
    kv_bytes: int  # that one token keeps
    kernels: int  # without those of hits
    slices: int  # that a prompt's large matrices are written out in, besides the first of each

    @property
    def launches(self) -> float:
        """Of a prompt's layer, by those of Qwen3-30B-A3B's: about as the kernels of a decode step."""
        kernels = self.kernels - HEAD_KERNELS + HIT_KERNELS * len(self.experts) + SLICE_KERNELS * self.slices
        return kernels / self.n_block / CALIBRATED_KERNELS

    @property
    def expert_bytes(self) -> int:
        """All routed experts."""
        return self.n_expert * sum(layer.nbytes for layer in self.experts)

    @property
    def active_bytes(self) -> int:
        """Routed experts that one token reads."""
        return self.top_k * sum(layer.nbytes for layer in self.experts)

    @classmethod
    def of(cls, file: GGUFFile, meta: Metadata, family: type[Transformer], kv_dtype: str) -> "ModelWork":
        """kv_dtype: type of the KV cache."""
        n_block, n_expert = n_layer(meta), meta.integer("expert_count", high=MAX_EXPERTS)
        dense, prompt_dense = Counter[str](), Counter[str]()
        parts: dict[int, list[TensorInfo]] = {}
        weights = values = slices = 0
        for info in file.tensors.values():
            block = block_of(info.name)
            if block >= n_block or info.type is None:
                continue
            if is_expert(info.name):
                parts.setdefault(block, []).append(info)
                continue
            is_head = info.name == ("output.weight" if "output.weight" in file.tensors else "token_embd.weight")
            if info.name != "token_embd.weight" or is_head:
                dense[str(info.type)] += info.nbytes
            if block >= 0 and len(info.shape) > 1:
                prompt_dense[str(info.type)] += info.nbytes
                weights += _elements(info)
                values += sum(info.shape[-2:])
                slices += (_elements(info) - 1) // (2 * SCRATCH_ELEMENTS)  # in half precision
        top_k = meta.integer("expert_used_count", high=n_expert)
        of_experts = top_k * sum(sum(info.shape[-2:]) for infos in parts.values() for info in infos)
        layers = tuple(_expert_layer(block, infos, n_expert) for block, infos in sorted(parts.items()))
        return cls(
            n_block=n_block,
            n_expert=n_expert,
            top_k=top_k,
            experts=layers,
            dense=dict(dense),
            prompt_weights=weights,
            prompt_dense=dict(prompt_dense),
            # In f32, and once more between products: norms, rotation, residual; experts' in bf16
            activation_bytes=8 * values + 2 * of_experts,
            attention_operations=n_block * _attention_operations(meta),
            kv_bytes=n_block * cached_bytes(kv_dtype, family.kv_values(meta)),
            kernels=HEAD_KERNELS + sum(_kernels(file, block, block in parts) for block in range(n_block)),
            slices=slices,
        )


def _elements(info: TensorInfo) -> int:
    n = 1
    for size in info.shape:
        n *= size
    return n


def _expert_layer(block: int, infos: list[TensorInfo], n_expert: int) -> ExpertLayer:
    by_type = Counter[str]()
    for info in infos:
        by_type[str(info.type)] += info.nbytes // n_expert
    nbytes = sum(aligned(info.nbytes // n_expert) for info in infos)
    return ExpertLayer(block, nbytes, dict(by_type), sum(_elements(info) for info in infos) // n_expert)


def _attention_operations(meta: Metadata) -> int:
    n_head = meta.integer("attention.head_count")
    default = max(1, meta.integer("embedding_length") // n_head)
    sizes = 0
    for part in ("key", "value"):
        length = meta.integer(f"attention.{part}_length", default)
        sizes += meta.integer(f"attention.{part}_length_mla", length)
    return 2 * n_head * sizes


def _kernels(file: GGUFFile, block: int, has_experts: bool) -> int:
    prefix = f"blk.{block}."

    def has(name: str) -> bool:
        return f"{prefix}{name}.weight" in file.tensors

    n = LATENT_KERNELS if has("attn_kv_a_mqa") else ATTENTION_KERNELS
    if has("attn_q_a"):
        n += LOW_RANK_QUERY_KERNELS
    if not has_experts:
        return n + FEED_FORWARD_KERNELS
    return n + MIXTURE_KERNELS + (SHARED_KERNELS if has("ffn_down_shexp") else 0)
