"""The router: which experts a token goes to, and with which weights. Plain torch, the definition of correct.

Sources: Fedus et al. 2021 (top-k softmax); DeepSeek-V2 and V3 reports (group limits, selection bias).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Gating = Literal["softmax", "sigmoid", "softmax_selected", "sqrt_softplus"]
GroupRule = Literal["max", "top2_sum"]

# The smallest normal f16: what the sum of weights is clamped to before normalising, as llama.cpp does.
_SMALLEST_SUM = 6.103515625e-05


@dataclass(frozen=True)
class RouterConfig:
    """How scores become a token's experts and their weights. Where n_group > 1, only the experts of the n_group_used
    best groups are chosen from."""

    n_expert: int
    top_k: int
    gating: Gating = "softmax"
    normalize: bool = False  # weights of the chosen experts sum to one
    scale: float = 1.0
    n_group: int = 1
    n_group_used: int = 1
    group_rule: GroupRule = "max"


def gate(logits: Tensor, gating: Gating) -> Tensor:
    """Scores f32 from logits f32, both `[n_token, n_expert]`."""
    if gating == "softmax":
        return logits.softmax(dim=-1)
    if gating == "sigmoid":
        return logits.sigmoid()
    if gating == "sqrt_softplus":
        return torch.nn.functional.softplus(logits).sqrt()
    return logits


def route(logits: Tensor, config: RouterConfig, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chosen experts int64 `[n_token, top_k]`, best first, and their weights f32 of the same shape.

    logits: f32 `[n_token, n_expert]`. bias: f32 `[n_expert]`, added for the selection only. Of equal scores the
    lowest index wins.
    """
    scores = gate(logits, config.gating)
    selection = scores if bias is None else scores + bias
    if config.n_group > 1:
        selection = _limit_groups(selection, config)
    # A stable sort keeps the lowest index first among equals; topk promises nothing.
    expert_ids = selection.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
    weights = scores.gather(1, expert_ids)
    if config.gating == "softmax_selected":
        weights = weights.softmax(dim=-1)
    if config.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST_SUM)
    return expert_ids, weights * config.scale


def _limit_groups(selection: Tensor, config: RouterConfig) -> Tensor:
    """Selection scores with all but the best groups of experts at minus infinity."""
    groups: Tensor = selection.unflatten(1, (config.n_group, -1))  # [n_token, n_group, experts of a group]
    if config.group_rule == "max":
        group_scores = groups.amax(dim=-1)
    else:
        group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    best = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, : config.n_group_used]
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return groups.masked_fill(~keep[..., None], float("-inf")).flatten(1)
