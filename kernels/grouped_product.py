"""The mixture of experts for prompts: tokens sorted by expert, times quantized matrices that lie in slots.

Two ways. `fused` dequantizes weight tiles on their way to the tensor cores. `dequantized` writes the experts that
have tokens out as bf16, some at a time, and multiplies those. `moe_prompt` takes the one that is faster for the type
and the size. Nothing here waits for the device. Without a GPU the kernels run in Triton's interpreter, which must be
switched on (TRITON_INTERPRET=1) before the first use; where it is not, there is `PlainProduct`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_engine.kernels.device import is_interpreted, shared_memory, table
from moe_engine.kernels.grouped_expand import check_pool, expanded, expanded_part
from moe_engine.kernels.grouped_sort import Groups, Sorted, sort_by_expert
from moe_engine.kernels.slot_layout import SlotLayout, SlotPart

__all__ = ["Groups", "Sorted", "choose_method", "grouped_down", "grouped_gate_up", "moe_prompt", "sort_by_expert"]

Method = Literal["fused", "dequantized"]
IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Tiling:
    block_m: int  # rows; groups with at most half of that get half a tile
    block_n: int  # rows of the weight
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


LEAST_ROWS = 16  # of a tile
WIDE_TILE_BYTES = 200 << 10  # of shared memory: four stages of 128 and 256 rows of 64 bf16 numbers, and some


def _tiling(n_row: int, n_group: int) -> _Tiling:
    """Tile sizes for the average size of a group.

    Measured on an H200, Q4_K, Qwen3-30B-A3B, gate and up in ms: 4 rows a group 0.160 (16), 0.162 (32), 0.246 (128);
    16 rows 0.216, 0.171, 0.245 and 0.195 (64); 64 rows 0.314 (64), 0.269 (128); 128 rows 0.503 and 0.385. With
    block_m 256 or block_n 256, or with three stages, it was slower; the registers are for two programs a core.
    """
    rows = n_row / n_group
    if rows > 48:
        return _Tiling(128, 128, 8, 4, 128)
    if rows > 24:  # not measured between 16 and 64
        return _Tiling(64, 128, 4, 4)
    return _Tiling(32 if rows > 8 else LEAST_ROWS, 64, 4, 4)


def _is_fast(part: SlotPart, pool: Tensor) -> bool:
    """Whether the type has a decoder of its own and blocks are aligned as it needs."""
    alignment = {"Q4_K": 4, "Q6_K": 2, "Q8_0": 2, "BF16": 16}.get(part.type.name)
    if alignment is None or part.n_in % 128:
        return False
    return (pool.data_ptr() | pool.stride(0) | part.offset) % alignment == 0


def _type_constants(part: SlotPart) -> dict[str, Any]:
    from moe_engine.kernels.unpack import RUN_WIDTHS

    name = part.type.name
    return {"TYPE": name, "BLOCK_BYTES": part.type.block_bytes, "RUN_WIDTH": RUN_WIDTHS[name]}


def _tile_map(groups: Groups, n_row: int, block_m: int, max_groups: int | None = None) -> tuple[Tensor, Tensor]:
    """For each row tile its group or -1, and its first row: int32 `[n_tile]`, an upper bound of what is needed.

    n_row: of all groups that have a slot, at most. max_groups: that there may be another time, so that one compiled
    kernel serves any number of them.
    """
    from moe_engine.kernels.grouped_kernels import tile_map_kernel

    n_group, chunk = len(groups), 32
    n_tile = min(n_row // block_m + n_group, n_row)
    n_tile = -(-n_tile // chunk) * chunk
    tiles = torch.empty(2, n_tile, dtype=torch.int32, device=groups.slots.device)
    pow2 = 1 << ((max_groups or n_group) - 1).bit_length()
    tile_map_kernel[(n_tile // chunk,)](
        groups.starts, groups.ends, groups.slots, tiles[0], tiles[1], n_group,
        BLOCK_M=block_m, N_GROUP_POW2=pow2, TILES=chunk, enable_fp_fusion=True,
    )  # fmt: skip
    return tiles[0], tiles[1]


def tile_map(starts: IntArray, ends: IntArray, block_m: int) -> tuple[IntArray, IntArray]:
    """What `_tile_map` says of groups that all have a slot, from what the host knows, and without room to spare.

    Returns int32 `[2, n_tile]`, group and first row of each tile, and by group how many tiles there are up to its last.
    """
    n_tile = -((starts - ends) // block_m)
    last = n_tile.cumsum()
    group = np.repeat(np.arange(len(starts)), n_tile)
    row = np.arange(len(group)) * block_m + (starts - (last - n_tile) * block_m)[group]
    return np.stack([group, row]).astype(np.int32), last


def _constants(part: SlotPart, pool: Tensor, tiling: _Tiling) -> dict[str, Any]:
    constants = _type_constants(part) | {"BLOCK_SIZE": part.type.block_size}
    constants |= {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n}
    constants["FAST"] = _is_fast(part, pool)
    constants |= {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages, "enable_fp_fusion": True}
    if tiling.maxnreg is not None and not is_interpreted():
        constants["maxnreg"] = tiling.maxnreg
    return constants


def _tiling_of(part: SlotPart, tiling: _Tiling, device: torch.device) -> _Tiling:
    """bf16 weights leave the registers for wider tiles, where the device has room for them.

    Measured on an H200, gate and up in us with 128 columns and three stages, 256 and three, 256 and four:
    Qwen3-30B-A3B, 128 rows a group 402, 362, 344, 1024 rows 1703, 1627, 1619; DeepSeek-V2-Lite, 192 rows 486, 426, 407;
    DeepSeek-V3, 64 rows 736, 663, 646, 256 rows 1365, 1197, 1199. With 256 rows or four warps it was slower.
    """
    if part.type.name != "BF16":
        return tiling
    if tiling.block_m == 128 and shared_memory(device) >= WIDE_TILE_BYTES:
        return _Tiling(128, 256, 8, 4)
    return replace(tiling, num_stages=3, maxnreg=None)


def grouped_gate_up(
    x: Tensor, row_index: Tensor | None, groups: Groups, pool: Tensor, gate: SlotPart, up: SlotPart,
    tiling: _Tiling | None = None, out: Tensor | None = None, tiles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """silu(gate x) * (up x) for the rows of each group: bf16 `[n_row, n_ff]`.

    x: bf16 `[n, n_in]`; row r is `x[row_index[r]]` (int32 `[n_row]`), or `x[r]`. pool: uint8 `[n_slot, slot_bytes]`.
    Gate and up must be of one type and shape. Of `out` only the rows of groups with a slot are written. tiles: what
    `_tile_map` says for them.
    """
    from moe_engine.kernels.grouped_kernels import gate_up_kernel

    check_pool(pool, gate)
    check_pool(pool, up)
    assert (gate.type, gate.n_out, gate.n_in) == (up.type, up.n_out, up.n_in), (gate, up)
    assert x.dtype == torch.bfloat16, x.dtype
    assert x.is_contiguous()
    assert x.shape[1] == gate.n_in, (x.shape, gate)
    n_row = x.shape[0] if row_index is None else row_index.numel()
    h = x.new_empty(n_row, gate.n_out) if out is None else out
    if n_row == 0:
        return h
    tiling = _tiling_of(gate, tiling or _tiling(n_row, len(groups)), x.device)
    tile_group, tile_row = tiles or _tile_map(groups, n_row, tiling.block_m)
    n_column_tile = -(-gate.n_out // (tiling.block_n // 2))
    gate_up_kernel[(tile_group.numel() * n_column_tile,)](
        x,
        groups.ends if row_index is None else row_index,
        h,
        pool,
        groups.ends,
        groups.slots,
        tile_group,
        tile_row,
        table(gate.type.id, x.device),
        pool.stride(0),
        gate.offset,
        up.offset - gate.offset,
        gate.type.row_bytes(gate.n_in),
        gate.n_in,
        gate.n_out,
        n_column_tile,
        HAS_INDEX=row_index is not None,
        **_constants(gate, pool, tiling),
    )
    return h


def grouped_down(
    h: Tensor, groups: Groups, pool: Tensor, down: SlotPart, tiling: _Tiling | None = None,
    out: Tensor | None = None, tiles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """down h for the rows of each group: bf16 `[n_row, n_out]`.

    h: bf16 `[n_row, n_in]`. The rest is as for `grouped_gate_up`.
    """
    from moe_engine.kernels.grouped_kernels import down_kernel

    check_pool(pool, down)
    assert h.dtype == torch.bfloat16, h.dtype
    assert h.is_contiguous()
    assert h.shape[1] == down.n_in, (h.shape, down)
    n_row = len(h)
    y = h.new_empty(n_row, down.n_out) if out is None else out
    if n_row == 0:
        return y
    tiling = _tiling_of(down, tiling or _tiling(n_row, len(groups)), h.device)
    tile_group, tile_row = tiles or _tile_map(groups, n_row, tiling.block_m)
    n_column_tile = -(-down.n_out // tiling.block_n)
    down_kernel[(tile_group.numel() * n_column_tile,)](
        h,
        y,
        pool,
        groups.ends,
        groups.slots,
        tile_group,
        tile_row,
        table(down.type.id, h.device),
        pool.stride(0),
        down.offset,
        down.type.row_bytes(down.n_in),
        down.n_in,
        down.n_out,
        n_column_tile,
        **_constants(down, pool, tiling),
    )
    return y


def weighted_sum(y: Tensor, ids: Tensor, place: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """Sums each token's rows of y in the order of its choices: f32 `[n_token, hidden]`. Slot -1 counts as zero."""
    from moe_engine.kernels.grouped_kernels import sum_kernel

    n_token, top_k = ids.shape
    out = torch.empty(n_token, y.shape[1], dtype=torch.float32, device=y.device)
    block = 1024
    sum_kernel[n_token, -(-y.shape[1] // block)](
        y, ids, place, weights, slots, out, y.shape[1], TOP_K=top_k, BLOCK=block, enable_fp_fusion=True
    )
    return out


def choose_method(part: SlotPart, pool: Tensor, rows: float, is_down: bool = False) -> Method:
    """The faster way for a part of a slot. With few rows an expert (`rows`: on average), the one of fewer launches.

    Measured on an H200 with Qwen3-30B-A3B, 64 and 2048 tokens, all of `moe_prompt` in ms, fused or dequantized:
    Q4_K 0.25 or 0.80, 0.63 or 1.01; Q6_K 0.87 or 0.85, 2.81 or 1.07; Q8_0 1.34 or 0.82, 2.44 or 1.03. Q4_K with 256
    rows an expert (DeepSeek-V3) 2.39 or 2.80; with 512 1.96 or 1.85, DeepSeek-V3 4.16 or 3.97; with 1024 3.70 or 3.10.
    DeepSeek-V2-Lite's down alone in Q8_0 (gate and up fused in Q4_K), 16, 64, 256 and 2048 tokens: 0.31 or 0.36, 0.36
    or 0.41, 0.40 or 0.44 (24 rows), 1.10 or 0.85.
    """
    most = {"Q4_K": 400, "Q6_K": 8, "Q8_0": 24 if is_down else 0}  # rows up to which fusing is faster
    fuses = rows <= most.get(part.type.name, 0)
    return "fused" if fuses and _is_fast(part, pool) else "dequantized"


class PromptProduct:
    """The mixture of experts of a prompt's tokens, some experts at a time, as they come to lie in slots.

    What `sum` gives does not depend on which experts were added together, nor on their slots.
    """

    LEAST_ROWS = LEAST_ROWS

    def __init__(
        self, x: Tensor, ids: Tensor, weights: Tensor, n_expert: int, layout: SlotLayout,
        method: Method | None = None, workspace: Tensor | None = None,
    ) -> None:  # fmt: skip
        """x: `[n_token, hidden]` of any float type (multiplied as bf16). ids: int32 or int64 `[n_token, top_k]`;
        weights: f32 of that shape. workspace: bf16, flat, at least `workspace_values`.
        """
        self.x, self.ids = x.to(torch.bfloat16).contiguous(), ids.contiguous()
        self.weights, self.layout, self.method = weights.to(torch.float32).contiguous(), layout, method
        self.sorted = sort_by_expert(self.ids, n_expert)
        n_row = ids.numel()
        self._n_expert, self._rows, self._tiling = n_expert, n_row / n_expert, _tiling(n_row, n_expert)
        n_h = n_row * layout.n_ff
        if workspace is None:
            workspace = self.x.new_empty(self.workspace_values(n_row, layout))
        self._h = workspace[:n_h].view(n_row, layout.n_ff)
        self._y = workspace[n_h : n_h + n_row * layout.hidden].view(n_row, layout.hidden)

    @staticmethod
    def workspace_values(n_row: int, layout: SlotLayout) -> int:
        """n_row: (token, choice) pairs."""
        return n_row * (layout.n_ff + layout.hidden)

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return self._tiling.block_m

    def add(self, pool: Tensor, groups: Groups, tiles: tuple[Tensor, Tensor] | None = None) -> None:
        """Computes some experts: `self.sorted.groups` of a slot table, or what the host knows of them.

        pool: uint8 `[n_slot, slot_bytes]`. tiles: group and first row of each, int32 `[n_tile]`, from `tile_map` with
        `block_m`, if the host knows them. The method `dequantized` takes memory for the weights of
        `grouped_expand.at_once` experts in bf16.
        """
        gate, up, down = self.layout.gate, self.layout.up, self.layout.down
        x, token, h, y, tiling = self.x, self.sorted.token, self._h, self._y, self._tiling
        n_row = len(h)
        whole = tiles or _tile_map(groups, n_row, tiling.block_m, self._n_expert)

        def tiles_of(some: Groups) -> tuple[Tensor, Tensor]:
            return whole if len(some) == len(groups) else _tile_map(some, n_row, tiling.block_m, self._n_expert)

        alike = (gate.type, gate.n_out) == (up.type, up.n_out)
        if alike and (self.method or choose_method(gate, pool, self._rows)) == "fused":
            grouped_gate_up(x, token, groups, pool, gate, up, tiling, h, whole)
        else:
            parts = expanded_part(gate), expanded_part(up, 2 * gate.n_out * gate.n_in)
            for some, placed, scratch in expanded(groups, pool, (gate, up)):
                grouped_gate_up(x, token, placed, scratch, *parts, tiling, h, tiles_of(some))
        if (self.method or choose_method(down, pool, self._rows, is_down=True)) == "fused":
            grouped_down(h, groups, pool, down, tiling=tiling, out=y, tiles=whole)
        else:
            for some, placed, scratch in expanded(groups, pool, (down,)):
                part = expanded_part(down)
                grouped_down(h, placed, scratch, part, tiling=tiling, out=y, tiles=tiles_of(some))

    def sum(self, added: Tensor) -> Tensor:
        """The weighted sum of each token's experts: f32 `[n_token, hidden]`.

        added: int32 `[n_expert]`; experts with -1 contribute nothing.
        """
        return weighted_sum(self._y, self.ids, self.sorted.place, self.weights, added)


def moe_prompt(
    x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor, pool: Tensor, layout: SlotLayout,
    method: Method | None = None,
) -> Tensor:  # fmt: skip
    """`PromptProduct` of all experts at once. slots: int32 `[n_expert]`, the slot of each expert in pool or -1."""
    product = PromptProduct(x, ids, weights, len(slots), layout, method)
    product.add(pool, product.sorted.groups(slots))
    return product.sum(slots)
