"""Routed experts of prompts on a GPU: cached ones where they lie, others through a ring, a few on the CPU meanwhile.

    look at the router's choice -> divide the experts -> begin copies -> products of what is there -> the CPU's share

Copies run ahead of the products, into the next layer too. The host waits once per layer, for the router's choice; only
the products that need an expert wait for its copy. Slots and their table stay as they are.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_engine.expert_ring import Chunk, Ring
from moe_engine.kernels.grouped_product import PromptProduct
from moe_engine.kernels.host_copy import upload
from moe_engine.kernels.plain_product import PlainProduct
from moe_engine.prompt_split import Rates, choose_for_cpu, cpu_seconds
from moe_engine.stats import PromptCounts

if TYPE_CHECKING:
    from moe_engine.expert_cache import CachedExperts

SHORT_PROMPT = 256  # tokens whose inputs come along with the choice, in case the CPU computes some
FORECAST_TOKENS = 1024  # of a micro-batch, from which the next layer's choice is foreseen
NEWEST = 0.2  # weight of the newest measurement in a rate


class _Choice(NamedTuple):
    """What the host has to know of a layer's routing."""

    counts: list[int]  # tokens of each expert
    resident: list[int]  # slot of each expert or -1
    resident_next: list[int]  # the same of the next layer
    forecast: list[int]  # tokens of each expert there, foreseen


Chooser = Callable[[Tensor], Tensor]
"""A layer's router: x f32 `[n_token, hidden]` to the ids of the chosen experts, int64 `[n_token, top_k]`."""


class _CpuShare(NamedTuple):
    """Tokens that have chosen experts of the CPU's: their numbers on the device, inputs, and choices, -1 for others."""

    tokens: Tensor
    x: Tensor
    ids: Tensor
    weights: Tensor


class PromptExperts:
    """Call it with a MoE layer; see `Experts` for the rest.

    n_token: tokens of a micro-batch at most. exact: the CPU gets nothing, so that results do not depend on what is
    cached. choosers: by MoE layer; applied to the inputs of the layer before, they say what to copy ahead.
    """

    def __init__(
        self, experts: "CachedExperts", n_token: int, top_k: int, exact: bool, choosers: Sequence[Chooser] = ()
    ) -> None:
        self.experts, self.exact, self.choosers = experts, exact, choosers
        self.rates, self.counts = Rates(), PromptCounts()
        device, n_expert, hidden = experts.device, experts.n_expert, experts.layouts[0].hidden
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        largest = max(layout.slot_bytes for layout in experts.layouts)
        self._ring = Ring(experts.staging, largest, experts.store, self._stream)
        self._ahead: tuple[int, deque[Chunk]] = (-1, deque())  # a layer, and what is being copied for it
        shared = (layer for layer in range(len(experts.layouts)) if layer not in experts.own_pools)
        self._first = next(shared, 0)  # layer that may need the ring
        self._product: type[PromptProduct] | type[PlainProduct] = PromptProduct if self._stream else PlainProduct
        n_row = n_token * top_k if self._stream else 0
        values = max(PromptProduct.workspace_values(n_row, layout) for layout in experts.layouts)
        self._workspace = torch.empty(values, dtype=torch.bfloat16, device=device)

        def host(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=self._stream is not None)

        # The host writes only after it has waited for a layer's choice, so what earlier layers had to read is read.
        n_short = min(SHORT_PROMPT, n_token)
        self._offsets, self._table, self._forecast = host(n_expert + 1), host(2, n_expert), host(n_expert)
        self._x = host(n_short, hidden, dtype=torch.float32)
        self._ids, self._weights = host(n_short, top_k, dtype=torch.int64), host(n_short, top_k, dtype=torch.float32)
        self._places = host(5, n_expert)
        self._partial = host(0, hidden, dtype=torch.float32)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts, pool = self.experts, self.experts.pool_of(layer)
        table = experts.slot_table[layer]
        product = self._product(x, ids, weights, experts.n_expert, pool.layout, workspace=self._workspace)
        if experts.holds_all or layer in experts.own_pools:
            if len(x) == 1:  # a step of the eager decoder, which counts
                experts.hits += ids.numel()
            product.add(pool.slots, table)
            return product.sum(table)

        arriving = self._take_ahead(layer)
        choice = self._look(layer, product.offsets, x, ids, weights)
        streamed, on_cpu = self._divide(layer, choice, arriving)
        coming = {expert for chunk in arriving for expert in chunk.experts}
        ring = self._ring
        following = ring.chunks(layer, pool.layout, [expert for expert in streamed if expert not in coming])
        self._send(following)
        hits, ahead, now, added, mine = self._upload_places(choice, streamed, on_cpu, arriving, following)
        share = self._cpu_share(x, ids, weights, mine, on_cpu) if on_cpu else None

        n_hit = sum(n for n, slot in zip(choice.counts, choice.resident, strict=True) if slot >= 0)
        if n_hit:
            product.add(pool.slots, hits, n_row=n_hit)
        used = set(streamed)
        for chunks, places in ((arriving, ahead), (following, now)):
            while chunks:
                self._send(following)
                chunk = chunks.popleft()
                assert chunk.sent
                ring.wait(chunk)
                n_row = sum(choice.counts[expert] for expert in chunk.experts if expert in used)
                if n_row:
                    first, last = chunk.experts[0], chunk.experts[-1]
                    product.add(chunk.slots, places[first : last + 1], first, n_row)
                ring.release(chunk)
        self._run_ahead(layer + 1, choice)
        out = product.sum(added)
        if share is not None:
            self._add_cpu_share(layer, out, share, choice, on_cpu)
        return out

    def _look(self, layer: int, offsets: Tensor, x: Tensor, ids: Tensor, weights: Tensor) -> _Choice:
        """Waits for the router's choice."""
        following = self.experts.slot_table[layer : layer + 2]
        if layer + 1 < len(self.choosers):
            foreseen = self.choosers[layer + 1](x[:FORECAST_TOKENS]).flatten()
            counts = torch.zeros(self.experts.n_expert, dtype=torch.int32, device=x.device)
            counts.index_add_(0, foreseen, counts.new_ones(1).expand(len(foreseen)))
            self._forecast.copy_(counts, non_blocking=True)
        self._offsets.copy_(offsets, non_blocking=True)
        self._table[: len(following)].copy_(following, non_blocking=True)
        if not self.exact and len(x) <= len(self._x):
            for host, device in ((self._x, x), (self._ids, ids), (self._weights, weights)):
                host[: len(x)].copy_(device, non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream().synchronize()
            self._note_link_rate()
        return _Choice(
            self._offsets.diff().tolist(), self._table[0].tolist(), self._table[-1].tolist(), self._forecast.tolist()
        )

    def _divide(self, layer: int, choice: _Choice, arriving: deque[Chunk]) -> tuple[list[int], list[int]]:
        """Experts to copy, ascending, and those for the CPU."""
        coming = {expert for chunk in arriving for expert in chunk.experts}
        wanted = [e for e, n in enumerate(choice.counts) if n and choice.resident[e] < 0]
        free = sorted((e for e in wanted if e not in coming), key=lambda expert: choice.counts[expert])
        layout, counts = self.experts.layouts[layer], [choice.counts[expert] for expert in free]
        n_elsewhere = sum(choice.counts) - sum(counts)
        operations = 6 * layout.hidden * layout.n_ff
        n_cpu = 0 if self.exact else choose_for_cpu(counts, n_elsewhere, layout.slot_bytes, operations, self.rates)
        on_cpu = set(free[:n_cpu])
        streamed = [expert for expert in wanted if expert not in on_cpu]
        unused = sum(1 for expert in coming if not choice.counts[expert])
        n_cached = sum(1 for n, slot in zip(choice.counts, choice.resident, strict=True) if n and slot >= 0)
        self.counts.cached, self.counts.streamed = self.counts.cached + n_cached, self.counts.streamed + len(streamed)
        self.experts.hits, self.experts.misses = self.experts.hits + n_cached, self.experts.misses + len(wanted)
        self.counts.cpu, self.counts.unused = self.counts.cpu + n_cpu, self.counts.unused + unused
        self.counts.streamed_bytes += (len(streamed) + unused) * layout.slot_bytes
        self.counts.cpu_bytes += n_cpu * layout.slot_bytes
        return streamed, sorted(on_cpu)

    # -- copies ------------------------------------------------------------------------------------------------

    def _take_ahead(self, layer: int) -> deque[Chunk]:
        """What has been copied ahead for this layer; anything else is given up."""
        intended, chunks = self._ahead
        self._ahead = (-1, deque())
        if intended == layer:
            return chunks
        for chunk in chunks:
            self._ring.release(chunk)
        if layer == 0:
            self._ring.restart()
        return deque()

    def _send(self, chunks: deque[Chunk]) -> None:
        for chunk in chunks:
            if not chunk.sent:
                if not self._ring.room:
                    return
                self._ring.send(chunk)

    def _run_ahead(self, layer: int, choice: _Choice) -> None:
        """Begins to copy what the next layer will probably choose, as much as the ring has room for."""
        if layer >= len(self.choosers) or layer in self.experts.own_pools:
            return
        ring, layout = self._ring, self.experts.layouts[layer]
        missing = [expert for expert, n in enumerate(choice.forecast) if n and choice.resident_next[expert] < 0]
        missing.sort(key=lambda expert: -choice.forecast[expert])
        chunks = ring.chunks(layer, layout, sorted(missing[: ring.room * ring.width(layout)]))
        self._send(chunks)
        self._ahead = (layer, chunks)

    def _note_link_rate(self) -> None:
        if (rate := self._ring.rate()) is not None:
            self.rates = replace(self.rates, pcie=self.rates.pcie + NEWEST * (rate - self.rates.pcie))

    def _upload_places(
        self, choice: _Choice, streamed: list[int], on_cpu: list[int], arriving: deque[Chunk], following: deque[Chunk]
    ) -> Tensor:
        """int32 `[5, n_expert]`: slots of cached experts; places, in their chunks, of those copied ahead, and of the
        other streamed ones; all three, to see what is added; -1 for others. The last: 1 for the CPU's.
        """
        hits, ahead, now, added, mine = self._places.fill_(-1).numpy()
        hits[:] = added[:] = choice.resident
        wanted = set(streamed)
        for row, chunks in ((ahead, arriving), (now, following)):
            for chunk in chunks:
                for place, expert in enumerate(chunk.experts):
                    if expert in wanted:
                        row[expert] = added[expert] = place
        mine[:] = 0
        mine[on_cpu] = 1
        return upload(self._places, self.experts.device)

    # -- the CPU's share ---------------------------------------------------------------------------------------

    def _cpu_share(self, x: Tensor, ids: Tensor, weights: Tensor, mine: Tensor, on_cpu: list[int]) -> _CpuShare:
        n = len(x)
        if n <= len(self._x):
            tokens = torch.arange(n, device=x.device)
            x, ids, weights = self._x[:n], self._ids[:n], self._weights[:n]
        else:
            tokens = mine[ids].any(dim=1).nonzero().flatten()
            x, ids, weights = (tensor[tokens].cpu() for tensor in (x, ids, weights))
        return _CpuShare(tokens, x, torch.where(torch.isin(ids, torch.tensor(on_cpu)), ids, -1), weights)

    def _add_cpu_share(self, layer: int, out: Tensor, share: _CpuShare, choice: _Choice, on_cpu: list[int]) -> None:
        n = len(share.x)
        if len(self._partial) < n:
            self._partial = torch.empty(n, out.shape[1], pin_memory=self._stream is not None)
        partial, experts = self._partial[:n], self.experts
        started = time.perf_counter()
        # Right into page-locked memory: PyTorch's threads would have to wake for a copy, beside the pool's.
        experts.cpu.expert_ffn(experts.handles[layer], share.x, share.ids, share.weights, out=partial)
        seconds = time.perf_counter() - started
        out.index_add_(0, share.tokens, upload(partial, out.device))
        layout = self.experts.layouts[layer]
        bytes_operations = layout.slot_bytes, 6 * layout.hidden * layout.n_ff
        expected = sum(cpu_seconds(choice.counts[expert], *bytes_operations, self.rates) for expert in on_cpu)
        factor = 1 + NEWEST * (min(2.0, max(0.5, seconds / expected)) - 1)  # one stall says little
        self.rates = replace(self.rates, cpu_factor=self.rates.cpu_factor * factor)
