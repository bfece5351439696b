"""The router in two Triton launches, the product, and all the rest: gating, group limits, top-k, weights, slot lookup.

The same launches can choose for the next one or two layers, as their routers would if their input were this layer's:
a guess.

`router.route` is the definition of correct. Ids are equal to its wherever the selection scores are tied exactly or
differ by more than the rounding of the last bit (exponentials round differently); weights to 1e-6. Sources as there.

One launch for both, in which the last program to finish the product routes, was measured and is slower (H200, one
token: 5.3, 4.6 and 7.9 us for Qwen3-30B-A3B, DeepSeek-V2-Lite and V3; in two launches 3.1, 2.8 and 4.6).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_engine.kernels.decode_overlap import overlap_options
from moe_engine.kernels.device import cdiv, next_power_of_2
from moe_engine.kernels.router import RouterConfig
from moe_engine.kernels.router_triton import choose_kernel, logits_kernel
from moe_engine.kernels.worker import MAX_AHEAD

# Tokens that share one read of the router matrix. V3's product for 8 tokens takes 7.5 us with 4, 5.7 with 8.
_TOKEN_TILE = 8
# Elements of a router row that a program takes at a time, and its warps, for one token and for more. V3's product takes
# 2.7 us with (8192, 16), 3.0 with 8 warps, 3.4 with (512, 8); for 8 tokens 5.7 with (2048, 4), 6.9 with (512, 4).
_ONE_TOKEN, _MORE_TOKENS = (8192, 16), (2048, 4)


class Routing(NamedTuple):
    """Where `n_token` tokens go, each `[n_token, top_k]`, best expert first."""

    ids: Tensor  # int32
    weights: Tensor  # f32
    slots: Tensor  # int32; -1: not in a slot
    ahead: Tensor | None = None  # int32 [n_ahead, n_token, top_k]: what the next layers will probably choose

    @classmethod
    def empty(cls, n_token: int, top_k: int, device: torch.device, n_ahead: int = 0) -> "Routing":
        ids, slots = (torch.empty(n_token, top_k, dtype=torch.int32, device=device) for _ in range(2))
        ahead = torch.empty(n_ahead, n_token, top_k, dtype=torch.int32, device=device) if n_ahead else None
        return cls(ids, torch.empty(n_token, top_k, device=device), slots, ahead)


class NextRouter(NamedTuple):
    """The router of one of the next layers, of the same kind and with a bias where this layer's has one."""

    weight: Tensor
    bias: Tensor | None


class Replay(NamedTuple):
    """Recorded choices that take the place of the router's, for benchmarks."""

    choices: Tensor  # int32 [n_step, n_layer, top_k]
    step: Tensor  # int64 [1]; token t follows step + 97 t
    layer: int


def router_logits(x: Tensor, weight: Tensor, ahead: Sequence[Tensor] = ()) -> Tensor:
    """`x` f32 `[n_token, hidden]` times the router matrix f32 `[n_expert, hidden]`: f32 `[n_token, n_expert]`.

    For a few tokens: the matrix is read once per eight of them. ahead: at most MAX_AHEAD other matrices, whose logits
    follow each token's: `[n_token, (1 + len(ahead)) * n_expert]`.
    """
    (n_token, hidden), n_expert = x.shape, weight.shape[0]
    n_row = (1 + len(ahead)) * n_expert
    _checked(x, (n_token, hidden), torch.float32)
    for matrix in (weight, *ahead):
        _checked(matrix, (n_expert, hidden), torch.float32)
    out = x.new_empty(n_token, n_row)
    if n_token == 0:
        return out
    tokens = min(_TOKEN_TILE, next_power_of_2(n_token))
    hidden_tile, num_warps = _ONE_TOKEN if n_token == 1 else _MORE_TOKENS
    with torch.cuda.device_of(x):
        logits_kernel[n_row, cdiv(n_token, tokens)](
            x,
            *_padded([weight, *ahead]),
            out,
            n_token,
            N_EXPERT=n_expert,
            AHEAD=len(ahead),
            HIDDEN=hidden,
            TOKENS=tokens,
            HIDDEN_TILE=min(hidden_tile, next_power_of_2(hidden)),
            num_warps=min(num_warps, max(1, next_power_of_2(hidden) // 512)),
            **overlap_options(x.device),
        )
    return out


def route_and_lookup(
    x: Tensor,
    config: RouterConfig,
    slot_table: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ahead: Sequence[NextRouter] = (),
    replay: Replay | None = None,
) -> Routing:
    """Chooses each token's experts and looks up their slots, on the device, with no synchronisation.

    x: logits f32 `[n_token, n_expert]`, or, with `weight` (the router matrix, f32 `[n_expert, hidden]`), the normed
    hidden states f32 `[n_token, hidden]`. slot_table: int32 `[n_expert]`, an expert's slot or -1; without one the slots
    stay unwritten. bias: f32 `[n_expert]`, for the selection only. ahead: of at most MAX_AHEAD layers whose choice to
    guess, in the second form. replay: experts to choose; the weights stay the router's. All contiguous.
    """
    if weight is not None:
        x = router_logits(x, weight, [router.weight for router in ahead])
    n_token, n_expert = x.shape[0], config.n_expert
    _checked(x, (n_token, (1 + len(ahead)) * n_expert), torch.float32)
    if slot_table is not None:
        _checked(slot_table, (n_expert,), torch.int32)
    biases = [] if bias is None else [bias, *(router.bias for router in ahead if router.bias is not None)]
    assert len(biases) == (0 if bias is None else 1 + len(ahead))
    for each in biases:
        _checked(each, (n_expert,), torch.float32)
    out = Routing.empty(n_token, config.top_k, x.device, len(ahead))
    if n_token == 0:
        return out
    if replay is not None:
        _checked(replay.choices, (*replay.choices.shape[:2], config.top_k), torch.int32)
        _checked(replay.step, (1,), torch.int64)
        assert 0 <= replay.layer < replay.choices.shape[1], replay.layer
    group_size = n_expert // config.n_group
    with torch.cuda.device_of(x):
        choose_kernel[n_token, 1 + len(ahead)](
            x,
            *_padded(biases or [x]),
            out.ids if slot_table is None else slot_table,
            *out[:3],
            out.ids if out.ahead is None else out.ahead,
            config.scale,
            *((out.ids, out.ids, 1, 0) if replay is None else (*replay[:2], len(replay.choices), replay.layer)),
            REPLAY=replay is not None,
            N_LAYER=1 if replay is None else replay.choices.shape[1],
            AHEAD=len(ahead),
            HAS_BIAS=bias is not None,
            HAS_TABLE=slot_table is not None,
            N_EXPERT=n_expert,
            TOP_K=config.top_k,
            K_LANES=next_power_of_2(config.top_k),
            GATING=config.gating,
            NORMALIZE=config.normalize,
            N_GROUP=config.n_group,
            N_USED=config.n_group_used,
            TOP2=config.group_rule == "top2_sum" and group_size > 1,
            GROUPS=next_power_of_2(config.n_group),
            MEMBERS=next_power_of_2(group_size),
            num_warps=1,  # reduces without barriers
            **overlap_options(x.device),
        )
    return out


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """One for this layer and each that may be ahead: with stand-ins that are never read."""
    return tensors + tensors[:1] * (1 + MAX_AHEAD - len(tensors))


def _checked(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.is_contiguous()
    return tensor
