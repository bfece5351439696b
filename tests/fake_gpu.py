"""The GPU's side of the decode worker's protocol in plain Python: posts messages, checks every answer."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from random_blocks import random_blocks
from torch import Tensor

from moe_engine.kernels import _cpu
from moe_engine.kernels.cpu import CpuKernels
from moe_engine.kernels.quant_tensor import QuantTensor
from moe_engine.kernels.quant_types import BY_NAME
from moe_engine.kernels.slot_layout import SlotLayout, SlotPart
from moe_engine.kernels.worker import RING, X_BLOCK, Y_BLOCK, DecodeWorker, Mailbox, Mode, Rates, WorkerLayer
from moe_engine.policies.registry import PolicySpec, policy_of

N_LAYER, N_EXPERT, TOP_K, MAX_BATCH, HIDDEN, N_FF = 3, 6, 2, 4, 256, 256

LRU = policy_of("lru")

Ids = npt.NDArray[np.int64]

SEPARATE = SlotLayout.of(BY_NAME["Q4_K"], BY_NAME["Q4_K"], BY_NAME["Q6_K"], HIDDEN, N_FF)  # three stacks in RAM
PACKED = SlotLayout.of(BY_NAME["IQ4_XS"], BY_NAME["IQ4_XS"], BY_NAME["Q8_0"], HIDDEN, N_FF)  # as in a slot: one copy
LAYOUTS = [SEPARATE, PACKED, SEPARATE]


def check(seq: int, *fields: npt.NDArray[Any]) -> int:
    """Of all 32-bit words of some fields of a message, as int64: see `csrc/mailbox.h`."""
    words = sum(int(field.view(np.uint32).sum(dtype=np.uint64)) for field in fields)
    return int(np.uint64(seq % 2**32 << 32 | words % 2**32).astype(np.int64))


def random_rows(part: SlotPart, seed: int) -> Tensor:
    rows = random_blocks(part.type, N_EXPERT * part.n_out, part.n_in, np.random.default_rng(seed))
    return torch.from_numpy(rows).view(N_EXPERT, part.n_out, -1)


def expert_layer(layer: int) -> tuple[list[QuantTensor], Tensor]:
    """A layer's gate, up and down in RAM, and what its experts' slots should hold: uint8 `[N_EXPERT, slot_bytes]`."""
    layout = LAYOUTS[layer]
    images, weights = torch.zeros(N_EXPERT, layout.slot_bytes, dtype=torch.uint8), []
    for i, part in enumerate((layout.gate, layout.up, layout.down)):
        rows = random_rows(part, 10 * layer + i)
        place = images[:, part.offset : part.offset + part.nbytes]
        place.copy_(rows.flatten(1))
        inside = torch.as_strided(images, rows.shape, (layout.slot_bytes, rows.shape[2], 1), storage_offset=part.offset)
        weights.append(QuantTensor(inside if layout is PACKED else rows, part.type, part.n_in))
    return weights, images


WEIGHTS, IMAGES = zip(*(expert_layer(layer) for layer in range(N_LAYER)), strict=True)


def random_ids(rng: np.random.Generator, n_token: int) -> Ids:
    """`[N_LAYER, n_token, TOP_K]`."""
    tokens = [rng.choice(N_EXPERT, TOP_K, replace=False) for _ in range(N_LAYER * n_token)]
    return np.array(tokens).reshape(N_LAYER, n_token, TOP_K)


class FakeGpu:
    """meanwhile: called again and again while an answer is awaited."""

    def __init__(
        self,
        mode: Mode = "cpu",
        n_slot: Sequence[int] = (3, 3),
        *,
        copies: _cpu.CopyEngine | None = None,
        rates: Rates | None = None,
        max_background: int = 2,
        stall_seconds: float = 4.0,
        meanwhile: Callable[[], None] = lambda: None,
        device: str = "cpu",
        threads: int = 2,
        lookahead_bytes: int | None = None,
        policy: PolicySpec = LRU,
        copy_rate: float | None = None,
        fill_bytes: int = 16 << 20,
    ) -> None:
        self.mode, self.meanwhile = mode, meanwhile
        self.ahead: Sequence[
            Ids
        ] = ()  # what is predicted of each layer, as ids of a step: one layer before, two before
        self.kernels = CpuKernels(threads, spin_microseconds=0)
        self.handles = [self.kernels.register_experts(*weights) for weights in WEIGHTS]
        self.mailbox = Mailbox.allocate(N_LAYER, N_EXPERT, TOP_K, HIDDEN, MAX_BATCH, pinned=device == "cuda")
        self.table = torch.full((N_LAYER, N_EXPERT), -1, dtype=torch.int32, device=device)
        by_layout = {
            layout: torch.zeros(n, layout.slot_bytes, dtype=torch.uint8, device=device)
            for layout, n in zip((SEPARATE, PACKED), n_slot, strict=True)
        }
        self.pools = [by_layout[layout] for layout in LAYOUTS]
        layers = [WorkerLayer(*parts) for parts in zip(self.handles, LAYOUTS, self.pools, strict=True)]
        self.worker = DecodeWorker(
            self.mailbox,
            layers,
            self.table,
            self.kernels,
            mode=mode,
            rates=rates or Rates(),
            max_background=max_background,
            stall_seconds=stall_seconds,
            copies=copies,
            lookahead_bytes=lookahead_bytes,
            policy=policy,
            copy_rate=copy_rate,
            fill_bytes=fill_bytes,
        )

    def seq(self, step: int, layer: int) -> int:
        return step * (N_LAYER + 1) + layer

    def step(self, step: int, ids: Ids, allow_late: bool = True) -> list[tuple[int, int, int]]:
        """Expects, runs and checks a whole step, of which nothing is in flight at its end but copies."""
        self.worker.expect(step, ids.shape[1], allow_late)
        counts = self.layers(step, ids, allow_late)
        found = self.worker.wait_tokens(step, 20)
        assert found is not None
        assert (found.tokens, found.bad) == ([step] * ids.shape[1], False)
        self.worker.check_integrity()
        return counts

    def layers(self, step: int, ids: Ids, allow_late: bool = True) -> list[tuple[int, int, int]]:
        """Hit, computed and late pairs of each layer."""
        rng = np.random.default_rng(step)
        counts = [self.layer(step, layer, ids[layer], allow_late, rng) for layer in range(N_LAYER)]
        self.finish(step, [step] * ids.shape[1])
        return counts

    def layer(
        self, step: int, layer: int, ids: Ids, allow_late: bool, rng: np.random.Generator
    ) -> tuple[int, int, int]:
        n_token = len(ids)
        x = torch.from_numpy(rng.standard_normal((n_token, HIDDEN), dtype=np.float32))
        weights = rng.random((n_token, TOP_K), dtype=np.float32)
        self.check_slots()
        slots = np.where(ids >= 0, self.table[layer].cpu().numpy()[ids], -1)
        missed = (slots < 0) & (ids >= 0)
        hit = int((slots >= 0).sum())
        if missed.any():
            self.mailbox.x[:n_token] = x
            self.mailbox.y.fill_(np.nan)
        self.post(step, layer, ids, weights, slots, int(missed.sum()))
        if not missed.any():
            return hit, 0, 0
        flags, late, evicted = self.answer(step, layer, n_token)
        for index in evicted:
            assert self.table.view(-1)[index] >= 0
            assert index // N_EXPERT != layer or index % N_EXPERT not in ids
            self.table.view(-1)[index] = -1
        assert (late[~missed] == -1).all()
        is_late, cpu = late >= 0, missed & (late < 0)
        assert flags == cpu.any() + 2 * is_late.any()
        assert allow_late or not is_late.any()
        assert self.mode != "exact" or not cpu.any()
        for expert, slot in zip(ids[is_late], late[is_late], strict=True):
            assert torch.equal(self.pools[layer][slot].cpu(), IMAGES[layer][expert])
        if cpu.any():
            chosen = torch.from_numpy(np.where(cpu, ids, -1))
            expected = self.kernels.expert_ffn(self.handles[layer], x, chosen, torch.from_numpy(weights))
            assert torch.equal(self.mailbox.y[:n_token], expected)
        return hit, int(cpu.sum()), int(is_late.sum())

    def check_slots(self) -> None:
        """What the table calls resident is there, and no slot is given twice."""
        for layer, expert in (self.table >= 0).nonzero().tolist():
            assert torch.equal(self.pools[layer][self.table[layer, expert]].cpu(), IMAGES[layer][expert])

    def post(
        self,
        step: int,
        layer: int,
        ids: Ids,
        weights: npt.NDArray[np.float32],
        slots: npt.NDArray[np.int32],
        n_missed: int,
        n_ahead: int | None = None,
        publish: bool = True,
    ) -> None:
        """publish: write the number too, that the worker waits for."""
        box = self.mailbox
        record = box.messages[step % RING * N_LAYER + layer].numpy()
        fields: list[npt.NDArray[Any]] = []
        ahead = [guess[layer + 1 + i] for i, guess in enumerate(self.ahead) if layer + 1 + i < N_LAYER]
        for offset, values, dtype in (
            (box.ids_offset, ids, np.int32),
            (box.weights_offset, weights, np.float32),
            (box.slots_offset, slots, np.int32),
            *((box.ahead_offset + 4 * i * MAX_BATCH * TOP_K, guess, np.int32) for i, guess in enumerate(ahead)),
        ):
            words = np.ascontiguousarray(values, dtype)
            record[offset : offset + 4 * values.size] = words.view(np.uint8).reshape(-1)
            fields.append(words)
        header = record[:64].view(np.int64)
        header[1:4] = len(ids), n_missed, len(ahead) if n_ahead is None else n_ahead
        seq = self.seq(step, layer)
        header[4] = check(seq, *fields, header[1:4].astype(np.int32))
        x = box.x[: len(ids)].numpy().reshape(-1)
        for block in range(-(-x.size // X_BLOCK)):
            box.x_checks[block, 0] = check(seq, x[block * X_BLOCK :][:X_BLOCK])
        if publish:
            header[0] = seq

    def answer(self, step: int, layer: int, n_token: int) -> tuple[int, npt.NDArray[np.int32], list[int]]:
        """Flags, late slots `[n_token, TOP_K]`, evicted."""
        box, record = self.mailbox, self.mailbox.answer.numpy()
        header = record[:64].view(np.int64)
        numbers = box.answer_numbers[: -(-n_token * HIDDEN // Y_BLOCK), 0]
        while (numbers // 4 != self.seq(step, layer)).any():
            assert not box.control[0], "aborted"
            self.meanwhile()
            time.sleep(0.0001)
        flags, n_evicted = int(numbers[0] % 4), int(header[0])
        assert (numbers % 4 == flags).all()
        assert n_evicted <= 2 * n_token * TOP_K, "the GPU looks at no more evictions"
        late = np.full((n_token, TOP_K), -1, np.int32)
        if flags & 2:
            late = record[box.late_offset :].view(np.int32)[: late.size].reshape(late.shape).copy()
        return flags, late, record[box.evicted_offset :].view(np.int32)[:n_evicted].tolist()

    def finish(self, step: int, tokens: list[int], bad: bool = False) -> None:
        record = self.mailbox.tokens[step % RING].numpy()
        record[64:].view(np.int32)[: len(tokens)] = tokens
        header = record[:64].view(np.int64)
        header[1:3] = len(tokens), bad
        header[0] = self.seq(step, N_LAYER)
