"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): grouped-query attention with a norm per head."""

from moe_engine.kernels.router import RouterConfig
from moe_engine.layers import Attention, GroupedQueryAttention, router_config
from moe_engine.model import GroupedQueryTransformer


class Model(GroupedQueryTransformer):
    """Weights of the chosen experts sum to one; queries and keys have a norm per head."""

    def router_config(self) -> RouterConfig:
        return router_config(self.meta, default_gating="softmax", normalize=True)

    def attention(self, prefix: str) -> Attention:
        return GroupedQueryAttention(self.meta, self.weights, prefix, self.hidden, bias=False, qk_norm=True)
