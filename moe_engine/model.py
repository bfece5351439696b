"""The transformer every family shares. It never knows where a weight or an expert lives."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from moe_engine.config import EngineConfig
from moe_engine.experts import Experts
from moe_engine.kernels.decode_product import DECODE_TOKENS
from moe_engine.kernels.norm_rope import fused_rms_norm
from moe_engine.kernels.prompt_attention import EXPANDED_BYTES
from moe_engine.kernels.router import RouterConfig
from moe_engine.kv_cache import LayerCache, TokenShapes
from moe_engine.layers import (
    Attention,
    MixtureOfExperts,
    Normed,
    Span,
    SwiGLU,
    gqa_dimensions,
    rms_norm,
    router_config,
)
from moe_engine.metadata import Metadata
from moe_engine.rope import Rope, RopeConfig
from moe_engine.weights import Weights


class Block:
    """One layer: attention, then a dense feed-forward or a mixture of experts, each with a norm and a residual."""

    def __init__(self, attn_norm: Tensor, attn: Attention, ffn_norm: Tensor, ffn: SwiGLU | MixtureOfExperts) -> None:
        self.attn_norm, self.attn, self.ffn_norm, self.ffn = attn_norm, attn, ffn_norm, ffn


class Transformer(ABC):
    """A decoder; families derive from it and override the methods that say what differs.

    Attributes carry the file's tensor names. Building it takes every tensor of the file or raises.
    """

    def __init__(self, meta: Metadata, weights: Weights, experts: Experts, report: Callable[[], None]) -> None:
        """report: called after every layer."""
        self.meta, self.weights, self.experts = meta, weights, experts
        self.n_layer = n_layer(meta)
        self.hidden = meta.integer("embedding_length", high=1 << 20)
        self.eps = meta.number("attention.layer_norm_rms_epsilon", high=1.0)
        self.router = self.router_config()
        self.rope_config = self.make_rope_config()
        self.n_vocab = weights.shape("token_embd.weight")[0]
        self.token_embd = weights.embedding("token_embd.weight", self.n_vocab, self.hidden)
        self.blk = []
        for layer in range(self.n_layer):
            self.blk.append(self._block(layer))
            report()
        self.output_norm = weights.floats("output_norm.weight", self.hidden)
        head = "output.weight" if weights.has("output.weight") else "token_embd.weight"  # tied
        self.output = weights.linear(head, self.n_vocab, self.hidden)
        self.rope_freqs = weights.optional_floats("rope_freqs.weight", self.rope_config.n_rot // 2)
        weights.check_all_used(self.n_layer)

    # -- what a family overrides -------------------------------------------------------------------------------

    def router_config(self) -> RouterConfig:
        return router_config(self.meta, default_gating="softmax", normalize=None)

    @abstractmethod
    def make_rope_config(self) -> RopeConfig: ...

    @abstractmethod
    def attention(self, prefix: str) -> Attention: ...

    @staticmethod
    @abstractmethod
    def kv_values(meta: Metadata) -> int:
        """Values the KV cache keeps per token and layer."""

    @staticmethod
    @abstractmethod
    def attention_bytes(meta: Metadata, n_token: int, ctx: int, config: EngineConfig) -> int:
        """Bytes that one layer's attention holds besides scores, for `n_token` queries and `ctx` keys."""

    def shared_expert(self, prefix: str) -> SwiGLU | None:
        """The expert every token passes through, if the layer has one."""
        return None

    # ----------------------------------------------------------------------------------------------------------

    def _block(self, layer: int) -> Block:
        prefix, weights, hidden = f"blk.{layer}.", self.weights, self.hidden
        attn = self.attention(prefix)
        ffn: SwiGLU | MixtureOfExperts
        if weights.has(prefix + "ffn_gate_inp.weight"):
            shared = self.shared_expert(prefix)
            ffn = MixtureOfExperts(weights, prefix, hidden, self.router, self.experts, layer, shared)
        else:
            ffn = SwiGLU(weights, prefix, hidden)
        attn_norm = weights.floats(prefix + "attn_norm.weight", hidden)
        return Block(attn_norm, attn, weights.floats(prefix + "ffn_norm.weight", hidden), ffn)

    @property
    def kv_shapes(self) -> list[TokenShapes]:
        """Per layer, what the KV cache keeps of a token."""
        return [block.attn.kv_shapes for block in self.blk]

    def make_rope(self, n_position: int) -> Rope:
        return Rope(self.rope_config, n_position, self.output_norm.device, self.rope_freqs)

    def forward(self, ids: Tensor, position: int, cache: list[LayerCache], rope: Rope) -> Tensor:
        """Hidden states f32 `[T, hidden]`, normed for the head, of a sequence's tokens int64 `[T]` at `position`."""
        x = self.token_embd(ids)
        if self.weights.backend.fused:
            span = Span(position, torch.full((1,), position, dtype=torch.int32, device=x.device))
            few = len(ids) <= DECODE_TOKENS and all(block.attn.can_decode for block in self.blk)
            for block, layer_cache in zip(self.blk, cache, strict=True):
                x = (self._few_tokens if few else self._many_tokens)(block, x, span, layer_cache, rope)
            return fused_rms_norm(x, self.output_norm, self.eps)
        for block, layer_cache in zip(self.blk, cache, strict=True):
            x = x + block.attn(rms_norm(x, block.attn_norm, self.eps), position, layer_cache, rope)
            x = x + block.ffn(rms_norm(x, block.ffn_norm, self.eps))
        return rms_norm(x, self.output_norm, self.eps)

    def _few_tokens(self, block: Block, x: Tensor, span: Span, cache: LayerCache, rope: Rope) -> Tensor:
        """A layer in the kernels of the decode step."""
        x = block.attn.decode(Normed.of(x, block.attn_norm, self.eps), x, span.start, cache.tensors, rope)
        normed = Normed.of(x, block.ffn_norm, self.eps)
        return block.ffn.few(normed, x) if isinstance(block.ffn, MixtureOfExperts) else block.ffn.decode(normed, x)

    def _many_tokens(self, block: Block, x: Tensor, span: Span, cache: LayerCache, rope: Rope) -> Tensor:
        """A layer on the tensor cores; x is overwritten."""
        rounded = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
        fused_rms_norm(x, block.attn_norm, self.eps, out=rounded)
        block.attn.prompt(rounded, x, span, cache.tensors, rope)
        if isinstance(block.ffn, MixtureOfExperts):
            block.ffn.prompt(fused_rms_norm(x, block.ffn_norm, self.eps), x)
        else:
            fused_rms_norm(x, block.ffn_norm, self.eps, out=rounded)
            block.ffn.prompt(rounded, x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden]` from `forward` to logits f32 `[n, n_vocab]`."""
        return self.output(hidden)


def n_layer(meta: Metadata) -> int:
    """Layers of normal inference: appended blocks for multi-token prediction are not among them."""
    blocks = meta.integer("block_count", high=1 << 14)
    return blocks - meta.integer("nextn_predict_layers", 0, low=0, high=blocks - 1)


class GroupedQueryTransformer(Transformer):
    """What families with grouped-query attention share."""

    def make_rope_config(self) -> RopeConfig:
        return RopeConfig.from_metadata(self.meta, gqa_dimensions(self.meta)[2])

    @staticmethod
    def kv_values(meta: Metadata) -> int:
        _, n_kv_head, head_dim = gqa_dimensions(meta)
        return 2 * n_kv_head * head_dim

    @staticmethod
    def attention_bytes(meta: Metadata, n_token: int, ctx: int, config: EngineConfig) -> int:
        n_head, n_kv_head, head_dim = gqa_dimensions(meta)
        if config.activations == "float":
            return 4 * head_dim * (6 * n_token * n_head + 6 * ctx * n_kv_head)
        per_head = 0 if config.kv_dtype in ("f16", "bf16") else 4 * ctx * head_dim  # keys and values written out as f16
        expanded = min(max(EXPANDED_BYTES, per_head), per_head * n_kv_head)
        return 2 * head_dim * n_token * (3 * n_head + 2 * n_kv_head) + expanded
