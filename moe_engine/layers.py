"""The building blocks that model families share: norms, attention, feed-forward, mixture of experts.

`meta`, `weights` and a block's `prefix` ("blk.3.") go in, a callable with the GGUF's tensor names as attributes
comes out. Shapes: T tokens, H = hidden.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_engine.backend import add_prompt_product, decode_weight, empty_activations, prompt_products
from moe_engine.experts import Experts
from moe_engine.kernels.attention import attention
from moe_engine.kernels.decode_activations import RUN, Activations
from moe_engine.kernels.decode_attention import decode_attention
from moe_engine.kernels.decode_product import matvec, matvecs, moe_decode
from moe_engine.kernels.norm_rope import fused_rms_norm, qk_norm_rope_append
from moe_engine.kernels.norm_rope_cache import Cache, half_type, part
from moe_engine.kernels.prompt_attention import grouped_prompt_attention
from moe_engine.kernels.router import RouterConfig, route
from moe_engine.kernels.router_kernel import route_and_lookup
from moe_engine.kv_cache import LayerCache, TokenShapes
from moe_engine.metadata import MAX_EXPERTS, Metadata
from moe_engine.rope import Rope
from moe_engine.weights import Weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


class Attention(Protocol):
    """What a family's attention must offer: the definition in plain f32, and two forms in fused kernels."""

    kv_shapes: TokenShapes
    can_decode: bool  # whether `decode` takes these dimensions

    def __call__(self, x: Tensor, position: int, cache: LayerCache, rope: Rope) -> Tensor:
        """`x` f32 `[T, H]`, the normed hidden states of the tokens from `position` on, to `[T, H]`."""
        ...

    def decode(self, x: "Normed", residual: Tensor, positions: Tensor, cache: tuple[Cache, ...], rope: Rope) -> Tensor:
        """The same for a few tokens, T / S of each of S sequences, plus `residual` `[T, H]`, for a CUDA graph.

        positions: int32 `[S]` on the device, a sequence's first token's; below zero: no token. cache: the sequences'
        tensors `[S, capacity, ...]`.
        """
        ...

    def prompt(self, x: Tensor, residual: Tensor, span: "Span", cache: tuple[Cache, ...], rope: Rope) -> None:
        """The same for many tokens of one sequence, `x` bf16 `[T, H]`, added to `residual` f32 `[T, H]`."""
        ...


class Span(NamedTuple):
    """Where the tokens of a prompt stand: the position of the first, on the host and int32 `[1]` on the device."""

    position: int
    start: Tensor


class Normed(NamedTuple):
    """What a block computes with in a decode step, f32 `[T, H]`, and the same in 8 bits where rows are whole runs."""

    values: Tensor
    rounded: Activations | None

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, eps: float) -> "Normed":
        rounded = empty_activations(x.shape[0], x.shape[1], x.device)
        return cls(fused_rms_norm(x, weight, eps, activations=rounded), rounded)


class GroupedQueryAttention:
    """Attention whose query heads share key heads (Ainslie et al. 2023), rotated half-split.

    `bias` and `qk_norm` say which tensors the family has besides the four matrices.
    """

    def __init__(
        self, meta: Metadata, weights: Weights, prefix: str, hidden: int, *, bias: bool, qk_norm: bool
    ) -> None:
        self.n_head, self.n_kv_head, self.head_dim = gqa_dimensions(meta)
        q_out, kv_out = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.kv_shapes: TokenShapes = ((self.n_kv_head, self.head_dim),) * 2
        self.can_decode = True
        self.eps = meta.number("attention.layer_norm_rms_epsilon")
        sizes = (q_out, kv_out, kv_out)
        if weights.has(prefix + "attn_qkv.weight"):
            parts = weights.split_rows(prefix + "attn_qkv.weight", sizes, hidden)
            self.attn_q, self.attn_k, self.attn_v = map(weights.backend.linear, parts)
        else:
            self.attn_q, self.attn_k, self.attn_v = (
                weights.linear(f"{prefix}attn_{name}.weight", size, hidden)
                for name, size in zip("qkv", sizes, strict=True)
            )
        self.biases: tuple[Tensor, ...] | None = None
        if bias and weights.has(prefix + "attn_qkv.bias"):
            self.biases = weights.floats(prefix + "attn_qkv.bias", sum(sizes)).split(sizes)
        elif bias:
            self.biases = tuple(
                weights.floats(f"{prefix}attn_{name}.bias", size) for name, size in zip("qkv", sizes, strict=True)
            )
        self.bias = None if self.biases is None else torch.cat(self.biases)
        self.attn_output = weights.linear(prefix + "attn_output.weight", hidden, q_out)
        self.norms: tuple[Tensor, Tensor] | None = None
        if qk_norm:
            self.norms = (
                weights.floats(prefix + "attn_q_norm.weight", self.head_dim),
                weights.floats(prefix + "attn_k_norm.weight", self.head_dim),
            )

    def __call__(self, x: Tensor, position: int, cache: LayerCache, rope: Rope) -> Tensor:
        q, k, v = self.attn_q(x), self.attn_k(x), self.attn_v(x)
        if self.biases is not None:
            q, k, v = (part + bias for part, bias in zip((q, k, v), self.biases, strict=True))
        q = q.unflatten(1, (self.n_head, self.head_dim))
        k, v = (part.unflatten(1, (self.n_kv_head, self.head_dim)) for part in (k, v))
        if self.norms is not None:
            q, k = rms_norm(q, self.norms[0], self.eps), rms_norm(k, self.norms[1], self.eps)
        q, k = rope.half_split(q, position), rope.half_split(k, position)
        keys, values = cache.append(position, k, v)
        mixed = attention(q, keys, values, self.head_dim**-0.5, position)  # [T, n_head, head_dim]
        return self.attn_output(mixed.flatten(1))

    def decode(self, x: Normed, residual: Tensor, positions: Tensor, cache: tuple[Cache, ...], rope: Rope) -> Tensor:
        weights = [decode_weight(linear) for linear in (self.attn_q, self.attn_k, self.attn_v)]
        q, k, v = (part.unflatten(1, (-1, self.head_dim)) for part in matvecs(x.values, weights, activations=x.rounded))
        keys, values = cache
        q = qk_norm_rope_append(
            q, k, v, rope.cos, rope.sin, positions, keys, values, norms=self.norms, eps=self.eps, bias=self.bias
        )
        rounded = empty_activations(len(q), self.n_head * self.head_dim, q.device) if self.head_dim % RUN == 0 else None
        query = q.unflatten(0, (len(positions), -1))  # [S, T / S, n_head, head_dim]
        mixed = decode_attention(query, keys, values, positions, self.head_dim**-0.5, activations=rounded)
        mixed = mixed.view(len(residual), -1)
        return matvec(mixed, decode_weight(self.attn_output), activations=rounded, residual=residual)

    def prompt(self, x: Tensor, residual: Tensor, span: Span, cache: tuple[Cache, ...], rope: Rope) -> None:
        products = prompt_products(x, self.attn_q, self.attn_k, self.attn_v)
        q, k, v = (heads.unflatten(1, (-1, self.head_dim)) for heads in products)
        keys, values = cache
        query = torch.empty(q.shape, dtype=half_type(keys), device=q.device)
        qk_norm_rope_append(
            q, k, v, rope.cos, rope.sin, span.start, keys, values,
            norms=self.norms, eps=self.eps, bias=self.bias, out=query,
        )  # fmt: skip
        mixed = grouped_prompt_attention(query, part(keys, 0), part(values, 0), self.head_dim**-0.5, span.position)
        add_prompt_product(residual, mixed.flatten(1), self.attn_output)


def gqa_dimensions(meta: Metadata) -> tuple[int, int, int]:
    """`(n_head, n_kv_head, head_dim)` of a family with grouped-query attention."""
    n_head = meta.integer("attention.head_count", high=1 << 16)
    n_kv_head = meta.integer("attention.head_count_kv", n_head, high=n_head)
    if n_head % n_kv_head:
        raise meta.fail("attention.head_count_kv", f"a divisor of the {n_head} heads")
    hidden = meta.integer("embedding_length", high=1 << 20)
    head_dim = meta.integer("attention.key_length", max(1, hidden // n_head), high=1 << 16)
    if meta.integer("attention.value_length", head_dim, high=1 << 16) != head_dim:
        raise meta.fail("attention.value_length", f"{head_dim}, as the keys")
    return n_head, n_kv_head, head_dim


class SwiGLU:
    """A dense feed-forward: `down(silu(gate x) * up x)` (Shazeer 2020), `x` f32 `[T, H]`, normed, to `[T, H]`.

    `suffix` "_shexp": the shared expert's.
    """

    def __init__(self, weights: Weights, prefix: str, hidden: int, suffix: str = "") -> None:
        n_ff = weights.shape(f"{prefix}ffn_down{suffix}.weight")[-1]
        self.weights = weights.feed_forward(prefix, suffix, n_ff, hidden)

    def __call__(self, x: Tensor) -> Tensor:
        w = self.weights
        return w.down(torch.nn.functional.silu(w.gate(x)) * w.up(x))

    def decode(self, x: Normed, residual: Tensor) -> Tensor:
        """The same for a few tokens, plus `residual` `[T, H]`, as a CUDA graph can hold it.

        Computed as an expert that every token chooses.
        """
        assert self.weights.packed is not None
        layout, pool = self.weights.packed
        slots = torch.zeros(len(x.values), 1, dtype=torch.int32, device=pool.device)
        return moe_decode(
            x.values, pool, layout, slots, self._scale(x.values), activations=x.rounded, residual=residual
        )

    def prompt(self, x: Tensor, residual: Tensor) -> None:
        """The same for many tokens, `x` bf16, added to `residual` f32 `[T, H]`."""
        add_prompt_product(residual, self._activated(x), self.weights.down)

    def _activated(self, x: Tensor) -> Tensor:
        gate, up = prompt_products(x, self.weights.gate, self.weights.up)
        return torch.nn.functional.silu(gate).mul_(up)

    def _scale(self, x: Tensor) -> Tensor:
        """What the output is multiplied with, f32 `[T, 1]`."""
        return torch.ones(len(x), 1, device=x.device)


class GatedSwiGLU(SwiGLU):
    """A shared expert whose output is scaled by the sigmoid of one scalar per token (Qwen2-MoE)."""

    def __init__(self, weights: Weights, prefix: str, hidden: int) -> None:
        super().__init__(weights, prefix, hidden, "_shexp")
        self.ffn_gate_inp_shexp = weights.floats(prefix + "ffn_gate_inp_shexp.weight", hidden)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * self._scale(x)

    def _activated(self, x: Tensor) -> Tensor:
        return super()._activated(x).mul_(self._scale(x.float()))

    def _scale(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.ffn_gate_inp_shexp)[:, None]


class MixtureOfExperts:
    """Router, routed experts (wherever they live) and the shared expert, if there is one."""

    def __init__(
        self,
        weights: Weights,
        prefix: str,
        hidden: int,
        router: RouterConfig,
        experts: Experts,
        layer: int,
        shared: SwiGLU | None,
    ) -> None:
        self.router, self.experts, self.layer, self.shared = router, experts, layer, shared
        self.on_route: Callable[[Tensor, Tensor], None] | None = None  # told every choice: ids and weights [T, top_k]
        self.ffn_gate_inp = weights.floats(prefix + "ffn_gate_inp.weight", router.n_expert, hidden)
        self.exp_probs_b = None
        for name in ("exp_probs_b.bias", "exp_probs_b"):  # older files have the bare name
            if weights.has(prefix + name):
                self.exp_probs_b = weights.floats(prefix + name, router.n_expert)
        gate, up, down = weights.experts(prefix, router.n_expert, hidden)
        experts.register(layer, gate, up, down)

    def __call__(self, x: Tensor) -> Tensor:
        out = self._routed(x)
        return out if self.shared is None else out + self.shared(x)

    def few(self, x: Normed, residual: Tensor) -> Tensor:
        """The same for a few tokens, plus `residual` `[T, H]`, with the shared expert in fused kernels."""
        out = self._routed(x.values)
        return out.add_(residual if self.shared is None else self.shared.decode(x, residual))

    def prompt(self, x: Tensor, residual: Tensor) -> None:
        """The same for many tokens, `x` f32, added to `residual` f32 `[T, H]`."""
        residual.add_(self._routed(x))
        if self.shared is not None:
            self.shared.prompt(x.bfloat16(), residual)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, int32 or int64, and weights f32 of the chosen experts, both `[T, top_k]`."""
        logits = x @ self.ffn_gate_inp.T
        if x.is_cuda:  # one launch instead of ten; elsewhere the definition
            return route_and_lookup(logits, self.router, None, bias=self.exp_probs_b)[:2]
        return route(logits, self.router, self.exp_probs_b)

    def _routed(self, x: Tensor) -> Tensor:
        expert_ids, expert_weights = self.choose(x)
        if self.on_route is not None:
            self.on_route(expert_ids, expert_weights)
        return self.experts(self.layer, x, expert_ids, expert_weights)


def router_config(meta: Metadata, *, default_gating: str, normalize: bool | None) -> RouterConfig:
    """The router's settings; `normalize` None means the file's key decides (default: no)."""
    names = {1: "softmax", 2: "sigmoid", 3: "softmax_selected", 4: "sqrt_softplus"}
    number = {name: i for i, name in names.items()}[default_gating]
    gating = names[meta.integer("expert_gating_func", number, low=0, high=4) or number]
    n_expert = meta.integer("expert_count", high=MAX_EXPERTS)
    n_group = meta.integer("expert_group_count", 1, low=0, high=n_expert) or 1
    if n_expert % n_group:
        raise meta.fail("expert_group_count", f"a divisor of the {n_expert} experts")
    n_group_used = meta.integer("expert_group_used_count", n_group, low=0, high=n_group) or n_group
    selectable = n_expert // n_group * n_group_used
    return RouterConfig(
        n_expert,
        top_k=meta.integer("expert_used_count", high=selectable),
        gating=gating,  # type: ignore[arg-type]
        normalize=meta.flag("expert_weights_norm", False) if normalize is None else normalize,
        scale=meta.number("expert_weights_scale", 1.0, low=-1e6, high=1e6) or 1.0,
        n_group=n_group,
        n_group_used=n_group_used,
        # DeepSeek-V2 (softmax) ranks groups by their best expert, V3 (sigmoid) by the sum of the best two.
        group_rule="max" if gating == "softmax" else "top2_sum",
    )
