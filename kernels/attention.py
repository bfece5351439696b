"""Causal attention over a KV cache in plain torch, with bounded memory. The definition of correct."""

import torch
from torch import Tensor

# Scores of one chunk of queries, in bytes.
SCORE_BYTES = 64 << 20


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, position: int) -> Tensor:
    """Softmax attention with grouped heads; every query sees itself and what came before.

    query: f32 `[n_token, n_head, d]`, the tokens at `position` and after. key: f32 `[n_key, n_kv_head, d]` and
    value `[n_key, n_kv_head, d_value]` with `n_key = position + n_token`. Head h reads key head
    `h // (n_head / n_kv_head)`. Returns f32 `[n_token, n_head, d_value]`.
    """
    n_token, n_head, d = query.shape
    n_key, n_kv_head = key.shape[:2]
    group = n_head // n_kv_head
    keys, values = key.permute(1, 2, 0), value.transpose(0, 1)  # [n_kv_head, d, n_key], [n_kv_head, n_key, d_value]
    out = query.new_empty(n_token, n_head, value.shape[-1])
    chunk = max(1, SCORE_BYTES // (4 * n_head * n_key))
    for start in range(0, n_token, chunk):
        stop = min(start + chunk, n_token)
        q = query[start:stop].unflatten(1, (n_kv_head, group)).permute(1, 2, 0, 3)  # [n_kv_head, group, t, d]
        scores = torch.matmul(q.reshape(n_kv_head, -1, d), keys).mul_(scale)  # [n_kv_head, group * t, n_key]
        if n_token > 1:
            last_visible = torch.arange(position + start, position + stop, device=query.device)
            hidden = torch.arange(n_key, device=query.device) > last_visible[:, None]  # [t, n_key]
            scores.view(n_kv_head, group, stop - start, n_key).masked_fill_(hidden, float("-inf"))
        mixed = torch.matmul(scores.softmax(dim=-1), values)  # [n_kv_head, group * t, d_value]
        out[start:stop] = mixed.view(n_head, stop - start, -1).transpose(0, 1)
    return out
