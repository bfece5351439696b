"""DeepSeek-V2, V2-Lite, V3, R1 and Kimi-K2: multi-head latent attention (MLA), shared experts, group limits.

Source: the DeepSeek-V2 report (MLA, absorbed form) and the V3 report (sigmoid router with a selection bias).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_engine.backend import (
    add_prompt_product,
    decode_weight,
    empty_activations,
    prepared_halves,
    prompt_products,
    scratch_values,
)
from moe_engine.config import EngineConfig
from moe_engine.errors import UnsupportedModelError
from moe_engine.kernels.attention import attention
from moe_engine.kernels.decode_activations import RUN
from moe_engine.kernels.decode_attention import decode_attention
from moe_engine.kernels.decode_product import matvec, matvecs
from moe_engine.kernels.dequantize import Halves
from moe_engine.kernels.norm_rope import fused_rms_norm, latent_norm_rope_append
from moe_engine.kernels.norm_rope_cache import Cache, cached_halves, half_type, part
from moe_engine.kernels.prompt_attention import EXPANDED_BYTES, heads_at_once, prompt_attention
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.kernels.router import RouterConfig
from moe_engine.kv_cache import LayerCache, TokenShapes
from moe_engine.layers import Attention, Normed, Span, SwiGLU, rms_norm, router_config
from moe_engine.metadata import Metadata
from moe_engine.model import Transformer
from moe_engine.rope import Rope, RopeConfig
from moe_engine.weights import Weights


@dataclass(frozen=True)
class MLADimensions:
    """Sizes of latent attention, in values of one head where nothing else is said."""

    n_head: int
    kv_lora: int  # width of the latent that stands for all heads' keys and values
    n_rot: int  # rotated part of a key, shared by all heads
    qk_nope: int  # part of a key that is not rotated
    v_dim: int

    @classmethod
    def from_metadata(cls, meta: Metadata) -> "MLADimensions":
        # New files describe the latent cache under key_length and the heads under *_mla; old ones only the heads.
        qk = "attention.key_length_mla" if meta.has("attention.key_length_mla") else "attention.key_length"
        v = "attention.value_length_mla" if meta.has("attention.value_length_mla") else "attention.value_length"
        qk_dim = meta.integer(qk, low=2, high=1 << 16)
        n_rot = meta.integer("rope.dimension_count", high=qk_dim - 1)
        return cls(
            n_head=meta.integer("attention.head_count", high=1 << 16),
            kv_lora=meta.integer("attention.kv_lora_rank", high=1 << 16),
            n_rot=n_rot,
            qk_nope=qk_dim - n_rot,
            v_dim=meta.integer(v, high=1 << 16),
        )


class Model(Transformer):
    """Latent attention; router and shared experts as the file's keys and tensors say."""

    def router_config(self) -> RouterConfig:
        # Files from before the gating key are V2's; a selection bias without the key means V3's sigmoid.
        has_bias = any(".exp_probs_b" in name for name in self.weights.file.tensors)
        return router_config(self.meta, default_gating="sigmoid" if has_bias else "softmax", normalize=None)

    def make_rope_config(self) -> RopeConfig:
        self.mla = MLADimensions.from_metadata(self.meta)
        config = RopeConfig.from_metadata(self.meta, self.mla.qk_nope + self.mla.n_rot)
        # This family's YaRN attention factor sits in the softmax scale, see `softmax_scale`.
        return replace(config, attention_factor=1.0)

    def attention(self, prefix: str) -> Attention:
        return LatentAttention(self.meta, self.weights, prefix, self.hidden, self.mla)

    @staticmethod
    def kv_values(meta: Metadata) -> int:
        d = MLADimensions.from_metadata(meta)
        return d.kv_lora + d.n_rot

    @staticmethod
    def attention_bytes(meta: Metadata, n_token: int, ctx: int, config: EngineConfig) -> int:
        d = MLADimensions.from_metadata(meta)
        latent, matrices = d.kv_lora + d.n_rot, d.n_head * d.kv_lora * (d.qk_nope + d.v_dim)
        if config.activations == "int8":
            per_head = 2 * ctx * (d.qk_nope + d.v_dim)
            expanded = min(max(EXPANDED_BYTES, per_head), per_head * d.n_head)
            per_token = d.n_head * (d.qk_nope + 2 * d.n_rot + d.v_dim) + meta.integer("embedding_length") + latent
            return 2 * (n_token * per_token + ctx * latent + matrices) + expanded
        expanded = min(EXPANDED_BYTES, 4 * ctx * d.n_head * (d.qk_nope + d.n_rot + d.v_dim))
        return 4 * latent * (6 * n_token * d.n_head + 4 * ctx) + 3 * expanded

    def shared_expert(self, prefix: str) -> SwiGLU | None:
        declared = self.meta.integer("expert_shared_count", 0, low=0) > 0
        if not declared and not self.weights.has(prefix + "ffn_down_shexp.weight"):
            return None
        return SwiGLU(self.weights, prefix, self.hidden, "_shexp")


def softmax_scale(meta: Metadata, dimensions: MLADimensions) -> float:
    """1/sqrt(key size), times YaRN's squared attention factor where the file asks for it."""
    scale: float = (dimensions.qk_nope + dimensions.n_rot) ** -0.5
    if meta.text("rope.scaling.type", "none") != "yarn":
        return scale
    # The key holds 0.1 * mscale_all_dim.
    multiplier = meta.number("rope.scaling.yarn_log_multiplier", 0.0)
    mscale: float = 1.0 + multiplier * math.log(meta.number("rope.scaling.factor", 1.0, low=1.0))
    return scale * mscale * mscale


class LatentAttention:
    """MLA: the cache keeps one latent (`kv_lora`) and one rotated key (`n_rot`) per token for all heads.

    Few tokens use the absorbed form: queries are carried into the latent space, and all heads attend to the same
    latents. Many tokens expand the latents into keys and values per head, which costs less from then on.
    """

    def __init__(self, meta: Metadata, weights: Weights, prefix: str, hidden: int, dimensions: MLADimensions) -> None:
        if meta.number("attention.temperature_scale", 0.0) != 0.0:
            raise UnsupportedModelError(
                f"{meta.source}: key '{meta.architecture}.attention.temperature_scale' is not supported"
            )
        self.dimensions = d = dimensions
        self.kv_shapes: TokenShapes = ((d.kv_lora + d.n_rot,),)
        self.can_decode = d.kv_lora in (1 << i for i in range(5, 11))
        self.scale = softmax_scale(meta, d)
        self.eps = meta.number("attention.layer_norm_rms_epsilon")
        q_out = d.n_head * (d.qk_nope + d.n_rot)
        self.attn_q_a_norm = None
        if weights.has(prefix + "attn_q_a.weight"):
            q_lora = weights.shape(prefix + "attn_q_a.weight")[0]
            self.attn_q_a = weights.linear(prefix + "attn_q_a.weight", q_lora, hidden)
            self.attn_q_a_norm = weights.floats(prefix + "attn_q_a_norm.weight", q_lora)
            self.attn_q = weights.linear(prefix + "attn_q_b.weight", q_out, q_lora)
        else:
            self.attn_q = weights.linear(prefix + "attn_q.weight", q_out, hidden)
        self.attn_kv_a_mqa = weights.linear(prefix + "attn_kv_a_mqa.weight", d.kv_lora + d.n_rot, hidden)
        self.attn_kv_a_norm = weights.floats(prefix + "attn_kv_a_norm.weight", d.kv_lora)
        k_b, v_b = self._key_value_matrices(weights, prefix)
        self.backend, self.k_b = weights.backend, k_b
        self.attn_k_b, self.attn_v_b = weights.backend.linear(k_b), weights.backend.linear(v_b)
        self.attn_output = weights.linear(prefix + "attn_output.weight", hidden, d.n_head * d.v_dim)
        self._halves: dict[tuple[int, int, torch.dtype], Halves] = {}  # of heads: the first, how many

    def _key_value_matrices(self, weights: Weights, prefix: str) -> tuple[QuantTensor, QuantTensor]:
        """`attn_k_b` `[n_head, kv_lora, qk_nope]` and `attn_v_b` `[n_head, v_dim, kv_lora]`, in RAM."""
        d = self.dimensions
        if weights.has(prefix + "attn_k_b.weight"):
            weights.ignore(prefix + "attn_kv_b.weight")  # some files hold both forms
            return (
                _stack(weights, prefix + "attn_k_b.weight", d.n_head, d.kv_lora, d.qk_nope),
                _stack(weights, prefix + "attn_v_b.weight", d.n_head, d.v_dim, d.kv_lora),
            )
        # Files of before 2025 hold both in one matrix, the keys' part transposed: only that part is expanded.
        name = prefix + "attn_kv_b.weight"
        fused = _stack(weights, name, d.n_head, d.qk_nope + d.v_dim, d.kv_lora)
        keys = weights.backend.dequantize(fused.rows(0, d.qk_nope)).cpu()  # [n_head, qk_nope, kv_lora]
        k_b = QuantTensor(keys.transpose(1, 2).contiguous().view(torch.uint8), BY_NAME["F32"], d.qk_nope)
        return k_b, fused.rows(d.qk_nope, d.qk_nope + d.v_dim)

    def __call__(self, x: Tensor, position: int, cache: LayerCache, rope: Rope) -> Tensor:
        d = self.dimensions
        if self.attn_q_a_norm is not None:
            q = self.attn_q(rms_norm(self.attn_q_a(x), self.attn_q_a_norm, self.eps))
        else:
            q = self.attn_q(x)
        q_nope, q_pe = q.unflatten(1, (d.n_head, -1)).split([d.qk_nope, d.n_rot], dim=-1)
        q_pe = rope.interleaved(q_pe, position)  # [T, n_head, n_rot]
        latent, k_pe = self.attn_kv_a_mqa(x).split([d.kv_lora, d.n_rot], dim=-1)
        latent = rms_norm(latent, self.attn_kv_a_norm, self.eps)
        k_pe = rope.interleaved(k_pe[:, None], position)[:, 0]
        (seen,) = cache.append(position, torch.cat([latent, k_pe], dim=-1))  # [n_key, kv_lora + n_rot]
        attend = self._expanded if self._expand_pays(x.shape[0], seen.shape[0]) else self._absorbed
        return self.attn_output(attend(q_nope, q_pe, seen, position).flatten(1))

    def decode(self, x: Normed, residual: Tensor, positions: Tensor, cache: tuple[Cache, ...], rope: Rope) -> Tensor:
        d, n, device = self.dimensions, len(residual), residual.device
        first = self.attn_q if self.attn_q_a_norm is None else self.attn_q_a
        weights = (decode_weight(first), decode_weight(self.attn_kv_a_mqa))
        q, kv = matvecs(x.values, weights, activations=x.rounded)
        if self.attn_q_a_norm is not None:
            rounded = empty_activations(n, q.shape[1], device)
            q = fused_rms_norm(q, self.attn_q_a_norm, self.eps, activations=rounded)
            q = matvec(q, decode_weight(self.attn_q), activations=rounded)
        q_nope, q_pe = q.unflatten(1, (d.n_head, -1)).split([d.qk_nope, d.n_rot], dim=-1)
        rounded = empty_activations(d.n_head * n, d.qk_nope, device)
        query = torch.empty(n, d.n_head, d.kv_lora + d.n_rot, device=device)
        (latents,) = cache
        latent_norm_rope_append(
            q_pe,
            kv,
            self.attn_kv_a_norm,
            rope.cos,
            rope.sin,
            positions,
            latents,
            eps=self.eps,
            out=query[..., d.kv_lora :],
            q_nope=None if rounded is None else q_nope,
            activations=rounded,
        )
        absorbed = query[..., : d.kv_lora].transpose(0, 1)  # [n_head, n, kv_lora]
        matvec(q_nope.transpose(0, 1), decode_weight(self.attn_k_b), absorbed, rounded)
        rounded = empty_activations(d.n_head * n, d.kv_lora, device)
        query = query.unflatten(0, (len(positions), -1))  # [S, n / S, n_head, kv_lora + n_rot]
        mixed = decode_attention(query, latents, None, positions, self.scale, d_value=d.kv_lora, activations=rounded)
        heads = torch.empty(n, d.n_head, d.v_dim, device=device)
        out_rounded = empty_activations(n, d.n_head * d.v_dim, device) if d.v_dim % RUN == 0 else None
        matvec(
            mixed.flatten(0, 1).transpose(0, 1),
            decode_weight(self.attn_v_b),
            heads.transpose(0, 1),
            rounded,
            out_activations=out_rounded,
        )
        return matvec(heads.flatten(1), decode_weight(self.attn_output), activations=out_rounded, residual=residual)

    def prompt(self, x: Tensor, residual: Tensor, span: Span, cache: tuple[Cache, ...], rope: Rope) -> None:
        d, (latents,) = self.dimensions, cache
        first = self.attn_q if self.attn_q_a_norm is None else self.attn_q_a
        q, kv = prompt_products(x, first, self.attn_kv_a_mqa)
        if self.attn_q_a_norm is not None:
            normed = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            fused_rms_norm(q, self.attn_q_a_norm, self.eps, out=normed)
            (q,) = prompt_products(normed, self.attn_q)
        q_nope, q_pe = q.unflatten(1, (d.n_head, -1)).split([d.qk_nope, d.n_rot], dim=-1)
        rotated = torch.empty(q_pe.shape, dtype=half_type(latents), device=q.device)
        latent_norm_rope_append(
            q_pe, kv, self.attn_kv_a_norm, rope.cos, rope.sin, span.start, latents, eps=self.eps, out=rotated
        )
        seen = cached_halves(part(latents, (slice(0, 1), slice(span.position + len(x)))))[0]
        mixed = self._prompt_attention(q_nope, rotated, seen, span.position)
        add_prompt_product(residual, mixed.flatten(1), self.attn_output)

    def _prompt_attention(self, q_nope: Tensor, q_pe: Tensor, seen: Tensor, position: int) -> Tensor:
        """Heads attend to keys and values expanded from the latents `seen`, some at a time: bf16 `[T, n_head, v_dim]`.

        V2-Lite and V3 multiply and add 1088 times a token, key and head with latents, 320 times with expanded keys and
        values; expanding takes 131072 a key and head. So it pays from 171 tokens on, and at 16 k keys costs little.
        """
        d, stacks = self.dimensions, (self.attn_k_b, self.attn_v_b)
        latents, k_pe = seen.split([d.kv_lora, d.n_rot], dim=-1)
        out = q_nope.new_empty(len(q_nope), d.n_head, d.v_dim)
        step = heads_at_once(d.n_head, len(seen) * (d.qk_nope + d.v_dim))
        step = min(step, scratch_values(self.attn_k_b) // (d.kv_lora * (d.qk_nope + d.v_dim)))
        for start in range(0, d.n_head, step):
            heads, key = slice(start, start + step), (start, step, seen.dtype)
            if key not in self._halves:
                self._halves[key] = prepared_halves(stacks, heads, seen.dtype)
            k_b, v_b = self._halves[key]()
            keys = torch.bmm(latents.expand(len(k_b), -1, -1), k_b)  # [heads, n_key, qk_nope]
            values = (latents @ v_b.flatten(0, 1).T).unflatten(1, (-1, d.v_dim))  # [n_key, heads, v_dim]
            prompt_attention(
                q_nope[:, heads],
                keys.transpose(0, 1),
                values,
                self.scale,
                position,
                query_shared=q_pe[:, heads],
                key_shared=k_pe,
                out=out[:, heads],
            )
        return out

    def _expand_pays(self, n_token: int, n_key: int) -> bool:
        """Whether expanding the keys costs fewer multiplications than the wider dot products it saves."""
        d = self.dimensions
        if 4 * n_key * d.n_head * (d.qk_nope + d.n_rot + d.v_dim) > EXPANDED_BYTES:
            return False
        saved = n_token * n_key * (2 * d.kv_lora - d.qk_nope - d.v_dim)
        absorb = n_token * d.kv_lora * (d.qk_nope + d.v_dim)
        return saved + absorb > n_key * d.kv_lora * (d.qk_nope + d.v_dim)

    def _absorbed(self, q_nope: Tensor, q_pe: Tensor, seen: Tensor, position: int) -> Tensor:
        """Heads attend in the latent space; `[T, n_head, v_dim]`."""
        q_latent = self.attn_k_b(q_nope.transpose(0, 1).contiguous()).transpose(0, 1)  # [T, n_head, kv_lora]
        query = torch.cat([q_latent, q_pe], dim=-1)
        values = seen[:, None, : self.dimensions.kv_lora]
        mixed = attention(query, seen[:, None], values, self.scale, position)  # [T, n_head, kv_lora]
        return self.attn_v_b(mixed.transpose(0, 1).contiguous()).transpose(0, 1)

    def _expanded(self, q_nope: Tensor, q_pe: Tensor, seen: Tensor, position: int) -> Tensor:
        """Heads attend to their own keys and values, made from the latents; `[T, n_head, v_dim]`."""
        d = self.dimensions
        latents, k_pe = seen.split([d.kv_lora, d.n_rot], dim=-1)
        k_nope = torch.einsum("hcd,kc->khd", self.backend.dequantize(self.k_b), latents)  # [n_key, n_head, qk_nope]
        keys = torch.cat([k_nope, k_pe[:, None].expand(-1, d.n_head, -1)], dim=-1)
        values = self.attn_v_b(latents.expand(d.n_head, -1, -1)).transpose(0, 1)  # [n_key, n_head, v_dim]
        return attention(torch.cat([q_nope, q_pe], dim=-1), keys, values, self.scale, position)


def _stack(weights: Weights, name: str, n_head: int, n_out: int, n_in: int) -> QuantTensor:
    """A matrix per head; some converters write the same bytes as one tall matrix."""
    if len(weights.shape(name)) == 3:
        return weights.quantized(name, (n_head, n_out, n_in))
    tall = weights.quantized(name, (n_head * n_out, n_in))
    return QuantTensor(tall.data.view(n_head, n_out, -1), tall.type, n_in)
