"""Experts of a prompt written out as bf16, as many at a time as the scratch memory holds."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from moe_engine.kernels.dequantize import tile_constants
from moe_engine.kernels.device import table
from moe_engine.kernels.grouped_sort import Groups
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.kernels.slot_layout import SlotPart

SCRATCH_BYTES = 200 << 20
EXPERTS_AT_ONCE = 8
"""At least, whatever they take: products of fewer leave cores idle. Measured on an H200 with DeepSeek-V3, Q6_K, 2048
tokens, all of `moe_prompt` in ms: 2.95 with 3 experts at a time, 2.26 with 8, 2.14 with all 32."""


def at_once(n_expert: int, n_value: int) -> int:
    """How many of n experts, with so many weights to write out, are written out at a time."""
    return min(n_expert, max(EXPERTS_AT_ONCE, SCRATCH_BYTES // (2 * n_value)))


def check_pool(pool: Tensor, part: SlotPart) -> None:
    """That `pool` is uint8 `[n_slot, slot_bytes]`, slots contiguous, with room for `part`."""
    assert pool.dtype == torch.uint8, pool.dtype
    assert pool.dim() == 2, pool.shape
    assert pool.stride(1) == 1, pool.stride()
    assert part.offset + part.nbytes <= pool.shape[1], (part, pool.shape)


def dequantize_groups(groups: Groups, pool: Tensor, part: SlotPart, out: Tensor) -> None:
    """Writes the part of every group with rows to `out[g]`: bf16 `[>= n_group, n_out * n_in]`, rows contiguous."""
    from moe_engine.kernels.grouped_kernels import dequantize_groups_kernel

    check_pool(pool, part)
    constants = tile_constants(part.type)
    n_block = part.n_out * part.n_in // part.type.block_size
    dequantize_groups_kernel[-(-n_block // constants["TILE_BLOCKS"]), len(groups)](
        pool,
        groups.starts,
        groups.ends,
        groups.slots,
        table(part.type.id, pool.device),
        out,
        pool.stride(0),
        part.offset,
        n_block,
        out.stride(0),
        enable_fp_fusion=False,
        **constants,
    )


@cache
def _counting(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.arange(n, dtype=torch.int32, device=device)


def expanded(groups: Groups, pool: Tensor, parts: tuple[SlotPart, ...]) -> Iterator[tuple[Groups, Groups, Tensor]]:
    """The groups' parts in bf16, as many groups at a time as there is room for: these groups, the same with their
    places in a pool of the parts one after the other, and that pool.
    """
    n_group, n_value = len(groups), sum(part.n_out * part.n_in for part in parts)
    n_slot = at_once(n_group, n_value)
    scratch = torch.empty(n_slot, n_value, dtype=torch.bfloat16, device=pool.device)
    for start in range(0, n_group, n_slot):
        stop = min(start + n_slot, n_group)
        some = groups.part(start, stop)
        at = 0
        for part in parts:
            dequantize_groups(some, pool, part, scratch[:, at : at + part.n_out * part.n_in])
            at += part.n_out * part.n_in
        yield some, replace(some, slots=_counting(stop - start, pool.device)), scratch.view(torch.uint8)


def expanded_part(part: SlotPart, offset: int = 0) -> SlotPart:
    """`part` in bf16, `offset` bytes into a slot."""
    return SlotPart(BY_NAME["BF16"], part.n_out, part.n_in, offset)
