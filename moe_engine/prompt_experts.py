"""Routed experts of prompts on a GPU: cached ones where they lie, others through a ring, a few on the CPU meanwhile.

    look at the router's choice -> divide the experts -> begin copies -> products of what is there -> the CPU's share

Copies run ahead of the products, into the next layer too. The host waits once per layer, for the router's choice; only
the products that need an expert wait for its copy. Nobody leaves a slot meanwhile. The decode worker may be filling
free ones: what counts for a layer is its row of the slot table as it comes with the choice.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_engine.expert_ring import Chunk, Ring
from moe_engine.kernels.grouped_product import PromptProduct, tile_map
from moe_engine.kernels.grouped_sort import Groups
from moe_engine.kernels.host_copy import upload
from moe_engine.kernels.layer_choice import ChoiceOnHost, LayerChoice
from moe_engine.kernels.plain_product import PlainProduct
from moe_engine.prompt_split import NEWEST, SHORT_PROMPT, IntArray, PromptRates, choose_for_cpu, cpu_seconds
from moe_engine.stats import PromptCounts

if TYPE_CHECKING:
    from moe_engine.expert_cache import CachedExperts

FORECAST_TOKENS = 1024  # of a micro-batch, from which the next layer's choice is foreseen

BoolArray = npt.NDArray[np.bool_]

Chooser = Callable[[Tensor], Tensor]
"""A layer's router: x f32 `[n_token, hidden]` to the ids of the chosen experts, int `[n_token, top_k]`."""


class _Launch(NamedTuple):
    """Products of experts that lie in one place."""

    chunk: Chunk | None  # None: slots of the cache
    groups: Groups
    tiles: tuple[Tensor, Tensor]  # of the groups


class _CpuShare(NamedTuple):
    """Tokens that have chosen experts of the CPU's: their numbers on the device, and where their sums will be."""

    tokens: Tensor
    sums: Tensor


class PromptExperts:
    """Call it with a MoE layer; see `Experts` for the rest.

    n_token: tokens of a micro-batch at most. exact: the CPU gets nothing, so that results do not depend on what is
    cached. choosers: by MoE layer; applied to the inputs of the layer before, they say what to copy ahead.
    """

    def __init__(
        self, experts: "CachedExperts", n_token: int, top_k: int, exact: bool, choosers: Sequence[Chooser] = ()
    ) -> None:
        self.experts, self.exact, self.choosers = experts, exact, choosers
        self.rates, self.counts = PromptRates(), PromptCounts()
        device, n_expert, hidden = experts.device, experts.n_expert, experts.layouts[0].hidden
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        largest = max(layout.slot_bytes for layout in experts.layouts)
        self._ring = Ring(experts.staging, largest, experts.store, self._stream)
        self._ahead: tuple[int, deque[Chunk]] = (-1, deque())  # a layer, and what is being copied for it
        through_cache = (layer for layer in range(len(experts.layouts)) if layer not in experts.own_pools)
        self._first = next(through_cache, 0)  # layer that uses the ring
        self._product: type[PromptProduct] | type[PlainProduct] = PromptProduct if self._stream else PlainProduct
        n_row = n_token * top_k if self._stream else 0
        values = max(PromptProduct.workspace_values(n_row, layout) for layout in experts.layouts)
        self._workspace = torch.empty(values, dtype=torch.bfloat16, device=device)

        # The host writes only after it has waited for a layer's choice, so what earlier layers had to read is read.
        self._choice = ChoiceOnHost(n_expert, min(SHORT_PROMPT, n_token), hidden, top_k, device)
        n_tile = n_token * top_k // self._product.LEAST_ROWS + n_expert
        self._places = torch.zeros(5 * n_expert + 2 * n_tile, dtype=torch.int32, pin_memory=self._stream is not None)
        self._partial = torch.empty(0, hidden)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts, pool = self.experts, self.experts.pool_of(layer)
        table = experts.slot_table[layer]
        ids, weights = ids.contiguous(), weights.contiguous()
        product = self._product(x, ids, weights, experts.n_expert, pool.layout, workspace=self._workspace)
        if experts.holds_all or layer in experts.own_pools:
            if len(x) == 1:  # a step of the eager decoder, which counts
                experts.hits += ids.numel()
            product.add(pool.slots, product.sorted.groups(table))
            return product.sum(table)

        arriving = self._take_ahead(layer)
        choice = self._look(layer, product.sorted.offsets, x, ids, weights)
        coming = np.zeros(experts.n_expert, dtype=bool)
        coming[[expert for chunk in arriving for expert in chunk.experts]] = True
        streamed, on_cpu = self._divide(layer, choice, coming, waits=not self._brings_inputs(x))
        ring = self._ring
        following = ring.chunks(layer, pool.layout, np.flatnonzero(streamed & ~coming).tolist())
        self._send(following)
        launches, added, mine = self._place(choice, streamed, on_cpu, arriving, following, product.block_m)
        share = self._begin_cpu_share(layer, x, ids, weights, mine, on_cpu.tolist()) if len(on_cpu) else None
        for launch in launches:
            chunk = launch.chunk
            if chunk is not None:
                self._send(following)
                assert chunk.sent
                ring.wait(chunk)
            if len(launch.groups):
                product.add(pool.slots if chunk is None else chunk.slots, launch.groups, launch.tiles)
            if chunk is not None:
                ring.release(chunk)
        self._run_ahead(layer + 1, choice)
        out = product.sum(added)
        if share is not None:
            self._add_cpu_share(layer, out, share, choice, on_cpu)
        return out

    def close(self) -> None:
        """Nothing reads experts any more."""
        self.experts.cpu.finish_expert_ffn()

    def _look(self, layer: int, offsets: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> LayerChoice:
        """Waits for the router's choice."""
        has_next = layer + 1 < len(self.choosers)
        foreseen = self.choosers[layer + 1](x[:FORECAST_TOKENS]).contiguous() if has_next else None
        tables = self.experts.slot_table[layer : layer + 2]
        choice = self._choice.read(offsets, tables, foreseen, (x, ids, weights) if self._brings_inputs(x) else None)
        if self._stream is not None:
            self._note_link_rate()
        return choice

    def _brings_inputs(self, x: Tensor) -> bool:
        """Whether the inputs come to the host with the choice."""
        return not self.exact and len(x) <= len(self._choice.x)

    def _divide(self, layer: int, choice: LayerChoice, coming: BoolArray, waits: bool) -> tuple[BoolArray, IntArray]:
        """Which experts are copied, those that are coming already among them; and the CPU's, ascending."""
        layout, chosen = self.experts.layouts[layer], choice.counts > 0
        streamed = chosen & (choice.resident < 0)
        free = np.flatnonzero(streamed & ~coming)
        free = free[np.argsort(choice.counts[free], kind="stable")]
        counts = choice.counts[free]
        n_elsewhere, operations = int(choice.counts.sum() - counts.sum()), 6 * layout.hidden * layout.n_ff
        n_cpu = 0
        if not self.exact:
            n_cpu = choose_for_cpu(counts, n_elsewhere, layout.slot_bytes, operations, self.rates, waits)
        on_cpu = np.sort(free[:n_cpu])
        self._count(layer, choice, streamed, coming, n_cpu)
        streamed[on_cpu] = False
        return streamed, on_cpu

    def _count(self, layer: int, choice: LayerChoice, missed: BoolArray, coming: BoolArray, n_cpu: int) -> None:
        n_missed, n_unused = int(missed.sum()), int((coming & ~missed).sum())
        n_cached = int((choice.counts > 0).sum()) - n_missed
        counts, nbytes = self.counts, self.experts.layouts[layer].slot_bytes
        self.experts.hits, self.experts.misses = self.experts.hits + n_cached, self.experts.misses + n_missed
        counts.cached, counts.unused = counts.cached + n_cached, counts.unused + n_unused
        counts.cpu, counts.streamed = counts.cpu + n_cpu, counts.streamed + n_missed - n_cpu
        counts.streamed_bytes += (n_missed - n_cpu + n_unused) * nbytes
        counts.cpu_bytes += n_cpu * nbytes

    # -- copies ------------------------------------------------------------------------------------------------

    def _take_ahead(self, layer: int) -> deque[Chunk]:
        """What has been copied ahead for this layer; anything else is given up."""
        intended, chunks = self._ahead
        self._ahead = (-1, deque())
        if intended == layer:
            return chunks
        for chunk in chunks:
            self._ring.release(chunk)
        if layer == self._first:
            self._ring.restart()
        return deque()

    def _send(self, chunks: deque[Chunk]) -> None:
        for chunk in chunks:
            if not chunk.sent:
                if not self._ring.room:
                    return
                self._ring.send(chunk)

    def _run_ahead(self, layer: int, choice: LayerChoice) -> None:
        """Begins to copy what the next layer will probably choose, as much as the ring has room for."""
        if layer >= len(self.choosers) or layer in self.experts.own_pools:
            return
        ring, layout = self._ring, self.experts.layouts[layer]
        missing = np.flatnonzero((choice.foreseen > 0) & (choice.resident_next < 0))
        best = missing[np.argsort(-choice.foreseen[missing], kind="stable")][: ring.room * ring.width(layout)]
        chunks = ring.chunks(layer, layout, np.sort(best).tolist())
        self._send(chunks)
        self._ahead = (layer, chunks)

    def _note_link_rate(self) -> None:
        if (rate := self._ring.rate()) is not None:
            self.rates = replace(self.rates, pcie=self.rates.pcie + NEWEST * (rate - self.rates.pcie))

    def _place(
        self, choice: LayerChoice, streamed: BoolArray, on_cpu: IntArray, arriving: Iterable[Chunk],
        following: Iterable[Chunk], block_m: int,
    ) -> tuple[list[_Launch], Tensor, Tensor]:  # fmt: skip
        """What is to be launched; then, int32 `[n_expert]`, -1 for experts that this does not add; and 1 for the CPU's.

        All of it goes to the device in one piece: the last two; start, end and slot of each group; tiles.
        """
        ends = choice.counts.cumsum()
        cached = np.flatnonzero((choice.counts > 0) & (choice.resident >= 0))
        planned: list[tuple[Chunk | None, IntArray, IntArray]] = [(None, cached, choice.resident[cached])]
        for chunk in (*arriving, *following):
            there = np.array(chunk.experts)
            places = np.flatnonzero(streamed[there])  # others came in vain: not chosen, or in a slot by now
            planned.append((chunk, there[places], places))
        experts, slots = (np.concatenate(parts) for parts in (*zip(*planned, strict=True),)[1:])
        sizes = [len(some) for _, some, _ in planned]
        bounds = np.cumsum([0, *sizes])
        starts, stops = (ends - choice.counts)[experts], ends[experts]
        tiles, last_tile = tile_map(starts, stops, block_m)
        tiles[0] -= np.repeat(bounds[:-1], sizes)[tiles[0]]  # a launch counts its own groups
        tile_bounds = np.concatenate([[0], last_tile])[bounds]

        n_group, n_expert = len(experts), len(choice.counts)
        buffer, at = self._places.numpy(), 2 * n_expert + 3 * n_group
        added, mine = buffer[: 2 * n_expert].reshape(2, n_expert)
        added[:], mine[:] = -1, 0
        added[experts], mine[on_cpu] = 0, 1
        buffer[2 * n_expert : at].reshape(3, n_group)[:] = starts, stops, slots
        buffer[at : at + tiles.size] = tiles.ravel()
        found = upload(self._places[: at + tiles.size], self.experts.device)

        of_experts, of_groups, of_tiles = found.split((2 * n_expert, 3 * n_group, tiles.size))
        groups, (tile_group, tile_row) = Groups(*of_groups.view(3, n_group)), of_tiles.view(2, -1)
        launches = [
            _Launch(chunk, groups.part(*some), (tile_group[slice(*their)], tile_row[slice(*their)]))
            for (chunk, _, _), some, their in zip(
                planned, pairwise(bounds.tolist()), pairwise(tile_bounds.tolist()), strict=True
            )
        ]
        return launches, of_experts[:n_expert], of_experts[n_expert:]

    # -- the CPU's share ---------------------------------------------------------------------------------------

    def _begin_cpu_share(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, mine: Tensor, on_cpu: list[int]
    ) -> _CpuShare:
        """Lets a thread compute it while this one goes on launching."""
        n = len(x)
        if n <= len(self._choice.x):
            tokens = torch.arange(n, device=x.device)
            x, ids, weights = self._choice.x[:n], self._choice.ids[:n], self._choice.weights[:n]
        else:
            tokens = mine[ids].any(dim=1).nonzero().flatten()
            x, ids, weights = (tensor[tokens].cpu() for tensor in (x, ids.int(), weights))
        if len(self._partial) < len(x):
            self._partial = torch.empty(len(x), x.shape[1], pin_memory=self._stream is not None)
        partial = self._partial[: len(x)]
        self.experts.cpu.begin_expert_ffn(self.experts.handles[layer], x, ids, weights, on_cpu, partial)
        return _CpuShare(tokens, partial)

    def _add_cpu_share(self, layer: int, out: Tensor, share: _CpuShare, choice: LayerChoice, on_cpu: IntArray) -> None:
        seconds = self.experts.cpu.finish_expert_ffn()
        out.index_add_(0, share.tokens, upload(share.sums, out.device))
        layout = self.experts.layouts[layer]
        operations = 6 * layout.hidden * layout.n_ff
        expected = float(cpu_seconds(choice.counts[on_cpu], layout.slot_bytes, operations, self.rates).sum())
        measured = max(0.0, seconds - self.rates.hand_over) / expected
        factor = 1 + NEWEST * (min(2.0, max(0.5, measured)) - 1)  # one stall says little
        self.rates = replace(self.rates, cpu_factor=self.rates.cpu_factor * factor)
