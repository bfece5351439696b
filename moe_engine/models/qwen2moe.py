"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased attention, a gated shared expert, raw router weights."""

from moe_engine.kernels.router import RouterConfig
from moe_engine.layers import (
    Attention,
    GatedSwiGLU,
    GroupedQueryAttention,
    router_config,
)
from moe_engine.model import GroupedQueryTransformer


class Model(GroupedQueryTransformer):
    """Weights of the chosen experts are the router's own; queries, keys and values have biases."""

    def router_config(self) -> RouterConfig:
        return router_config(self.meta, default_gating="softmax", normalize=False)

    def attention(self, prefix: str) -> Attention:
        return GroupedQueryAttention(self.meta, self.weights, prefix, self.hidden, bias=True, qk_norm=False)

    def shared_expert(self, prefix: str) -> GatedSwiGLU:
        return GatedSwiGLU(self.weights, prefix, self.hidden)
