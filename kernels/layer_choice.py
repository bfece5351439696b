"""What the host has to know of a layer's routing, written into its memory by one kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_engine.kernels.device import cdiv
from moe_engine.kernels.launch import launched

_BLOCK = 2048


class LayerChoice(NamedTuple):
    """By expert, int32."""

    counts: npt.NDArray[np.int32]  # tokens
    resident: npt.NDArray[np.int32]  # slot or -1
    resident_next: npt.NDArray[np.int32]  # the same in the next layer
    foreseen: npt.NDArray[np.int32]  # tokens there, as far as they were foreseen


class ChoiceOnHost:
    """Page-locked memory that a layer's choice is written to, and the inputs of few tokens with it (x by a copy).

    x: f32 `[n_token, hidden]`; ids: int32, weights: f32 `[n_token, top_k]`; room for the first tokens.
    """

    def __init__(self, n_expert: int, n_token: int, hidden: int, top_k: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._numbers = torch.zeros(4, n_expert, dtype=torch.int32, pin_memory=self._cuda)
        self.x = torch.zeros(n_token, hidden, pin_memory=self._cuda)
        self.ids = torch.zeros(n_token, top_k, dtype=torch.int32, pin_memory=self._cuda)
        self.weights = torch.zeros(n_token, top_k, pin_memory=self._cuda)

    def read(
        self,
        offsets: Tensor,
        tables: Tensor,
        foreseen: Tensor | None,
        inputs: tuple[Tensor, Tensor, Tensor] | None,
    ) -> LayerChoice:
        """Waits for the current stream.

        offsets: int32 `[n_expert + 1]`, where each expert's pairs begin. tables: int32 `[1 or 2, n_expert]`, slots in
        this layer and the next. foreseen: int, ids of experts there. inputs: x, ids and weights, contiguous, to be
        brought along.
        """
        tables = tables.expand(2, -1) if len(tables) == 1 else tables
        if self._cuda:
            self._launch(offsets, tables, foreseen, inputs)
            torch.cuda.current_stream(offsets.device).synchronize()
        else:
            n_expert = tables.shape[1]
            none = offsets.new_empty(0)
            counts = torch.bincount((none if foreseen is None else foreseen).flatten(), minlength=n_expert)
            self._numbers.copy_(torch.stack([offsets.diff(), *tables, counts]))
            for host, device in zip((self.x, self.ids, self.weights), inputs or (), strict=False):
                host[: len(device)].copy_(device)
        return LayerChoice(*self._numbers.numpy().copy())

    def _launch(
        self, offsets: Tensor, tables: Tensor, foreseen: Tensor | None, inputs: tuple[Tensor, Tensor, Tensor] | None
    ) -> None:
        n_expert = tables.shape[1]
        ids, weights, n_pair = offsets, offsets, 0  # stand-ins that are never read, as below
        if inputs is not None:
            x, ids, weights = inputs
            n_pair = ids.numel()
            self.x[: len(x)].copy_(x, non_blocking=True)  # 2 MB in 192 us where the kernel did it
        with torch.cuda.device_of(offsets):
            choice_kernel[(n_expert + cdiv(n_pair, _BLOCK),)](
                *(offsets, tables, offsets if foreseen is None else foreseen, ids, weights),
                *(self._numbers, self.ids, self.weights),
                tables.stride(0),
                0 if foreseen is None else foreseen.numel(),
                n_pair,
                N_EXPERT=n_expert,
                BLOCK=_BLOCK,
            )


@launched
@triton.jit(do_not_specialize=["next_table", "n_foreseen", "n_pair"])
def choice_kernel(
    offsets, tables, foreseen, ids, weights, numbers, host_ids, host_weights, next_table, n_foreseen, n_pair,
    N_EXPERT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first N_EXPERT programs write an expert's numbers each, the others a block of the pairs."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if program < N_EXPERT:
        here = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n_foreseen, BLOCK):
            here += (tl.load(foreseen + start + lane, mask=start + lane < n_foreseen, other=-1) == program).to(tl.int32)
        tl.store(numbers + program, tl.load(offsets + program + 1) - tl.load(offsets + program))
        tl.store(numbers + N_EXPERT + program, tl.load(tables + program))
        tl.store(numbers + 2 * N_EXPERT + program, tl.load(tables + next_table + program))
        tl.store(numbers + 3 * N_EXPERT + program, tl.sum(here, 0))
    else:
        at = (program - N_EXPERT) * BLOCK + lane
        tl.store(host_ids + at, tl.load(ids + at, mask=at < n_pair).to(tl.int32), mask=at < n_pair)
        tl.store(host_weights + at, tl.load(weights + at, mask=at < n_pair), mask=at < n_pair)
