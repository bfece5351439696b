"""The native decode worker: answers a decode step's cache misses while its CUDA graph runs.

The typed face of `csrc/decode_worker.h`, which says who writes what and when. All memory belongs to Python: the
mailbox here, slots and slot table with the engine; the worker is given addresses.
"""

import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels, ExpertHandle
from moe_engine.kernels.policy import native_policy
from moe_engine.kernels.slot_layout import SlotLayout
from moe_engine.policies.registry import PolicySpec

MAX_AHEAD = 2  # layers whose choices a message may predict
RING = 4  # steps whose messages and tokens have a place of their own
HEADER_BYTES = 64  # of every record: int64[8]
X_BLOCK = 16384  # values of a message's input that have one check
# Values of the CPU's sums that a program of the GPU adds: so few that all its loads are on their way together. In the
# compiled code those of 2048 values make seven trips over the bus, one after the other, for want of registers.
Y_BLOCK = 512

Mode = Literal["cpu", "fetch", "auto", "exact"]


def _whole_lines(n_bytes: int) -> int:
    return -(-n_bytes // 64) * 64


@dataclass(frozen=True)
class Mailbox:
    """The memory through which the GPU and the worker talk. Regions are zeroed and start on 64-byte boundaries."""

    n_layer: int
    n_expert: int
    top_k: int
    hidden: int
    max_batch: int
    messages: Tensor
    """uint8 `[RING * n_layer, message_bytes]`: record `step % RING * n_layer + layer`."""
    tokens: Tensor
    """uint8 `[RING, token_bytes]`; the numbers begin at HEADER_BYTES."""
    x: Tensor
    """f32 `[max_batch, hidden]`."""
    x_checks: Tensor
    """int64 `[n_block, 8]`: the first of each line for X_BLOCK values of `x`."""
    answer_numbers: Tensor
    """int64 `[n_block, 8]`: whoever adds Y_BLOCK values of `y` looks at the first of a line for the answer."""
    answer: Tensor
    """uint8 `[answer_bytes]`."""
    y: Tensor
    """f32 `[max_batch, hidden]`."""
    control: Tensor
    """int64 `[8]`: abort, gpu_error."""

    @classmethod
    def allocate(cls, n_layer: int, n_expert: int, top_k: int, hidden: int, max_batch: int, pinned: bool) -> "Mailbox":
        """`pinned`: page-locked, so that a GPU can address it."""

        def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            region = torch.zeros(*shape, dtype=dtype, pin_memory=pinned)
            assert region.data_ptr() % 64 == 0
            return region

        pairs = _whole_lines(4 * max_batch * top_k)
        return cls(
            n_layer,
            n_expert,
            top_k,
            hidden,
            max_batch,
            messages=zeros(RING * n_layer, _whole_lines(HEADER_BYTES + (12 + 4 * MAX_AHEAD) * max_batch * top_k)),
            tokens=zeros(RING, HEADER_BYTES + _whole_lines(4 * max_batch)),
            x=zeros(max_batch, hidden, dtype=torch.float32),
            x_checks=zeros(-(-max_batch * hidden // X_BLOCK), 8, dtype=torch.int64),
            answer_numbers=zeros(-(-max_batch * hidden // Y_BLOCK), 8, dtype=torch.int64),
            answer=zeros(HEADER_BYTES + pairs + _whole_lines(8 * max_batch * top_k)),
            y=zeros(max_batch, hidden, dtype=torch.float32),
            control=zeros(8, dtype=torch.int64),
        )

    @property
    def message_bytes(self) -> int:
        return self.messages.shape[1]

    @property
    def ids_offset(self) -> int:
        """In a message: int32 `[n_token, top_k]`; weights (f32) and slots (int32) have the same shape."""
        return HEADER_BYTES

    @property
    def weights_offset(self) -> int:
        return HEADER_BYTES + 4 * self.max_batch * self.top_k

    @property
    def slots_offset(self) -> int:
        return HEADER_BYTES + 8 * self.max_batch * self.top_k

    @property
    def ahead_offset(self) -> int:
        """In a message: int32 `[n_token, top_k]`, what the next layer will probably choose; room for MAX_AHEAD."""
        return HEADER_BYTES + 12 * self.max_batch * self.top_k

    @property
    def token_bytes(self) -> int:
        return self.tokens.shape[1]

    @property
    def late_offset(self) -> int:
        """In the answer: int32 `[n_token, top_k]`."""
        return HEADER_BYTES

    @property
    def evicted_offset(self) -> int:
        """In the answer: int32 `[n_evicted]`, at most two for each pair."""
        return HEADER_BYTES + _whole_lines(4 * self.max_batch * self.top_k)

    def native(self) -> _cpu.Mailbox:
        """For the worker. Valid while this lives."""
        regions = (
            self.messages,
            self.tokens,
            self.x,
            self.x_checks,
            self.answer_numbers,
            self.answer,
            self.y,
            self.control,
        )
        addresses = [region.data_ptr() for region in regions]
        native = _cpu.Mailbox(self.n_layer, self.top_k, self.hidden, self.max_batch, *addresses)
        sizes = (native.message_bytes, native.token_bytes, native.answer_bytes)
        assert sizes == (self.message_bytes, self.token_bytes, self.answer.numel()), sizes
        assert (native.x_block, native.y_block) == (X_BLOCK, Y_BLOCK)
        return native


@dataclass(frozen=True)
class WorkerLayer:
    """A MoE layer. Layers with the same `slots` share them."""

    experts: ExpertHandle
    """In RAM; page-locked where copies are to run beside everything else."""
    layout: SlotLayout
    slots: Tensor
    """uint8 `[n_slot, layout.slot_bytes]` on the device."""


@dataclass(frozen=True)
class Rates:
    """What "auto" begins with: bytes per second, which it then measures, and seconds that any work takes on top."""

    cpu: float = 20e9
    copy: float = 20e9
    cpu_beside_copies: float | None = None  # as alone
    cpu_fixed: float = 20e-6
    copy_fixed: float = 20e-6

    def native(self) -> _cpu.Rates:
        beside = self.cpu if self.cpu_beside_copies is None else self.cpu_beside_copies
        return _cpu.Rates(self.cpu, beside, self.copy, self.copy, self.cpu_fixed, self.copy_fixed)


@dataclass(frozen=True)
class Reservation:
    slot: int
    evicted: tuple[int, int] | None
    """(layer, expert) that was in the slot: the caller sets its entry in the slot table to -1."""


class DecodeWorker:
    """A thread that answers the messages of expected steps, and sleeps when none is expected.

    slot_table int32 `[n_layer, n_expert]` on the device. Starts at once; after `stop`, or once it has failed, it is of
    no further use. Methods raise RuntimeError with the reason once the worker has failed.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        layers: Sequence[WorkerLayer],
        slot_table: Tensor,
        kernels: CpuKernels,
        *,
        mode: Mode,
        policy: PolicySpec,
        rates: Rates = Rates(),
        max_background: int = 1,
        stall_seconds: float = 4.0,
        copies: _cpu.CopyEngine | None = None,
        copy_rate: float | None = None,
        lookahead_bytes: int | None = None,
        fill_bytes: int = 16 << 20,
    ) -> None:
        """policy: who leaves a slot, and what is fetched behind an answer. Raises ConfigError if it has no native twin.

        max_background: fetches in flight up to which another may start behind an answer; of one more it is enough that
            it should be over by then.

        lookahead_bytes: what each CPU thread but the worker's own may pull into its cache for the next layer at a time;
            default: three quarters of its second-level cache.

        fill_bytes: in flight while no step is pending, up to which `fill` begins more; a step's copies wait for them.

        stall_seconds: how long `wait_tokens` bears that neither side gets on. copies: an engine that nobody else uses;
        by default the one for slot_table's device. copy_rate: bytes per second that copies do not exceed, to imitate a
        slower link.
        """
        assert len(layers) == mailbox.n_layer, (len(layers), mailbox.n_layer)
        assert slot_table.shape == (mailbox.n_layer, mailbox.n_expert), slot_table.shape
        assert (slot_table.dtype, slot_table.is_contiguous()) == (torch.int32, True)
        self.mailbox, self._stall_seconds = mailbox, stall_seconds
        pools = list({layer.slots.data_ptr(): layer.slots for layer in layers}.values())
        numbers = torch.arange(max(map(len, pools)), dtype=torch.int32)
        if mailbox.control.is_pinned():
            numbers = numbers.pin_memory()
        if copies is None:
            cuda = slot_table.device.type == "cuda"
            copies = _cpu.CudaCopyEngine(slot_table.device.index or 0) if cuda else _cpu.HostCopyEngine()
        if copy_rate is not None:
            copies = _cpu.ThrottledCopyEngine(copies, copy_rate)
        self._memory = (mailbox, list(layers), slot_table, numbers)  # what the thread has addresses of
        classes = [[pool.data_ptr() for pool in pools].index(layer.slots.data_ptr()) for layer in layers]
        self._worker = _cpu.DecodeWorker(
            kernels.pool,
            copies,
            mailbox.native(),
            mailbox.n_expert,
            [_native_layer(*parts) for parts in zip(layers, classes, slot_table, strict=True)],
            [len(pool) for pool in pools],
            numbers.data_ptr(),
            native_policy(policy),
            mode,
            max_background,
            kernels.float_activations,
            rates.native(),
            stall_seconds,
            -1 if lookahead_bytes is None else lookahead_bytes,
            fill_bytes,
        )
        # Before the memory goes, and before the interpreter does.
        self.stop = weakref.finalize(self, self._worker.stop)
        """Ends the thread, also in the middle of a step (then abort is set), and all copies. May be called again."""

    def expect(
        self, step: int, n_token: int, allow_late: bool, posted: bool = True, pull: bool = True, idle: bool = False
    ) -> None:
        """Announces a step, just before its launch; the first is 1. Step `step - 2` must be complete.

        allow_late: the graph can compute experts that are fetched while it waits. posted: its layers send messages;
        False where all experts are in slots. pull: what a message predicts of the next layer is pulled into the CPU's
        caches. (Where a message predicts the one after that too, experts for both are fetched into slots.) idle: no
        token is real, and nothing is counted.
        """
        self._worker.expect(step, n_token, allow_late, posted, pull, idle)

    def wait_tokens(self, step: int, timeout: float = math.inf) -> _cpu.StepTokens | None:
        """The step's tokens; None if they have not come within `timeout` seconds. Of the last RING steps only.

        Raises RuntimeError if the worker has failed, the GPU has given up waiting, or neither has got on for
        `stall_seconds`; the mailbox's abort is set then.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            result = self._worker.wait_tokens(step, min(left, 0.05))  # signals are handled between the calls
            if result is not None or left == 0:
                return result

    # For loading and prompts: these raise RuntimeError while steps are pending.

    def settle(self) -> None:
        """Waits until all is filled and no copy is in flight. Raises RuntimeError if none ends in `stall_seconds`."""
        left, deadline = math.inf, math.inf
        while (n_expert := self._worker.settle(0.05)) > 0:  # signals are handled between the calls
            now = time.monotonic()
            if n_expert < left:
                left, deadline = n_expert, now + self._stall_seconds
            elif now > deadline:
                raise RuntimeError(f"{left} experts are on their way, but none has arrived in {self._stall_seconds} s")

    def fill(self, best_first: Sequence[tuple[int, int]]) -> None:
        """Begins to copy experts (layer, expert) into free slots, as long as there are any, and returns at once.

        Steps may run meanwhile: to them an expert that has not arrived is absent. Where the policy knows no other order
        the last one leaves first. The device must be done with what was launched before that uses slots or table.
        """
        self._worker.fill(list(best_first))

    def reserve(self, layer: int, expert: int, evict: bool = True) -> Reservation | None:
        """A slot for an absent expert, in flight until `complete` or `cancel`; None if there is none (to evict)."""
        slot, evicted = self._worker.reserve(layer, expert, "any" if evict else "nobody")
        victim = divmod(evicted, self.mailbox.n_expert) if evicted >= 0 else None
        return Reservation(slot, victim) if slot >= 0 else None

    def complete(self, layer: int, expert: int) -> None:
        """The bytes are in the slot. The caller writes the slot table."""
        self._worker.complete(layer, expert)

    def cancel(self, layer: int, expert: int) -> None:
        """Gives a reserved slot back."""
        self._worker.cancel(layer, expert)

    def release(self, layer: int, expert: int) -> None:
        """Evicts a resident expert. The caller writes the slot table."""
        self._worker.release(layer, expert)

    def use_counts(self) -> npt.NDArray[np.float32]:
        """`[n_layer, n_expert]`: uses of late, a count halves in 64 steps."""
        counts = np.array(self._worker.use_counts(), np.float32)
        return counts.reshape(self.mailbox.n_layer, self.mailbox.n_expert)

    def seed(self, counts: npt.NDArray[np.float32]) -> None:
        """Begins with the `use_counts` of an earlier run; before the first step."""
        assert counts.shape == (self.mailbox.n_layer, self.mailbox.n_expert), counts.shape
        self._worker.seed(counts.ravel().tolist())

    def slot_of(self, layer: int, expert: int) -> int:
        """-1 unless resident."""
        return self.residents(layer).get(expert, -1)

    def residents(self, layer: int) -> dict[int, int]:
        """Slots by expert."""
        return dict(self._worker.residents(layer))

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every slot is free, in flight or holds one expert that the policy knows."""
        self._worker.check_integrity()

    def stats(self) -> _cpu.WorkerStats:
        """Since the start or the last `reset_stats`; at any time."""
        return self._worker.stats()

    def reset_stats(self) -> None:
        self._worker.reset_stats()

    def timeline(self) -> npt.NDArray[np.void]:
        """The last messages (at most 4096) since `reset_stats`, oldest first.

        Fields, all int64: seq; on the clock of `time.monotonic_ns` seen, answered (0: nothing was missed), begun and
        computed (0: the CPU had nothing to do); n_hit pairs; n_cpu and n_now experts.
        """
        names = ("seq", "seen", "answered", "begun", "computed", "n_hit", "n_cpu", "n_now")
        return np.frombuffer(self._worker.timeline(), [(name, np.int64) for name in names])

    def copies(self) -> npt.NDArray[np.void]:
        """The last experts (at most 4096) whose copying has ended since `reset_stats`, oldest first.

        Fields, all int64: layer and expert; begun and ended on the clock of `timeline`.
        """
        fields = [(name, np.int64) for name in ("layer", "expert", "begun", "ended")]
        return np.frombuffer(self._worker.copies(), fields)


def _native_layer(layer: WorkerLayer, slot_class: int, table: Tensor) -> _cpu.WorkerLayer:
    handle, layout, slots = layer.experts, layer.layout, layer.slots
    assert slots.dtype == torch.uint8
    assert slots.stride() == (layout.slot_bytes, 1), (slots.stride(), layout.slot_bytes)
    parts: list[tuple[int, int, int, int]] = []  # address, distance between experts, offset in a slot, bytes
    for weight, part in ((handle.gate, layout.gate), (handle.up, layout.up), (handle.down, layout.down)):
        assert weight.type == part.type, (weight.type, part.type)
        assert weight.shape[1:] == (part.n_out, part.n_in), (weight.shape, part)
        address, stride = weight.data.data_ptr(), weight.data.stride(0)
        if parts:
            before, before_stride, offset, n_bytes = parts[-1]
            if (before + n_bytes, before_stride, offset + n_bytes) == (address, stride, part.offset):
                parts[-1] = (before, stride, offset, n_bytes + part.nbytes)  # one copy for both
                continue
        parts.append((address, stride, part.offset, part.nbytes))
    return _cpu.WorkerLayer(handle.layer, parts, slot_class, slots.data_ptr(), layout.slot_bytes, table.data_ptr())
