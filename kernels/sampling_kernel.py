"""Drawing the next token on the GPU, so that a decode step is one CUDA graph from embedding to token.

`sampling.Sampler` is the definition of correct: for equal logits, seed and position the tokens are the same. Weights
are f64 exponentials, so that rounding does not decide, and the random number is a function of seed and position alone:
neither the batch nor the graph changes what is drawn. What is set per sequence lives in device tensors that a captured
graph reads at every replay. Source: Salmon et al. 2011 (Philox).
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_engine.config import SamplingParams
from moe_engine.kernels.device import cdiv, next_power_of_2
from moe_engine.kernels.sampling_triton import (
    RECENT,
    SUPPRESSED,
    WINDOW,
    adjust_kernel,
    draw_kernel,
    few_kernel,
    greedy_kernel,
    maxima_kernel,
    sums_kernel,
)

Variant = Literal["greedy", "few", "full"]
"""How to draw: "greedy" for temperature 0 alone, "few" for top_k from 1 to 64, "full" for anything."""

FEW = 64  # the largest top_k of the variant "few"
# Measured on an H200 (torch 2.11, Triton 3.6), 151936 tokens, us for one sequence / eight.
# Tokens of a group and groups of a block; blocks of a program. "greedy": 2 blocks 5.4 / 8.9, 4 5.6 / 8.3, 8 7.1 / 10.3.
_GROUP, _BLOCKS = 16, 4
_FEW_WARPS = 16  # "few": 8 warps 23.7 / 25.8, 16 20.8 / 23.1, 32 21.5 / 23.8
# Sorted logits of a program. "full": 512 68 / 164, 1024 72 / 170, 2048 79 / 175; torch.sort alone 56 / 141.
_CHUNK = 512


def variant_for(params: Iterable[SamplingParams]) -> Variant:
    """The fastest variant that serves all these sequences. Greedy ones fit any."""
    sampled = [p for p in params if p.temperature > 0]
    if not sampled:
        return "greedy"
    return "few" if all(1 <= p.top_k <= FEW for p in sampled) else "full"


class SamplerState:
    """How each of `n_sequence` sequences draws, and its latest tokens, on the device."""

    def __init__(
        self, n_sequence: int, n_vocab: int, device: torch.device | str, suppress: Collection[int] = ()
    ) -> None:
        """suppress: tokens never to be drawn."""

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(n_sequence, *shape, dtype=dtype, device=device)

        self.n_vocab = n_vocab
        self.temperature, self.top_p, self.min_p, self.penalty = (zeros(torch.float32) for _ in range(4))
        self.top_k, self.seed = zeros(torch.int32), zeros(torch.int64)
        self.ring = zeros(torch.int32, WINDOW.value)  # the token of position p is at p % 64; -1: none
        self.flags = zeros(torch.uint8, n_vocab)  # RECENT, SUPPRESSED
        self.bad = zeros(torch.int32)  # 1: logits have not been finite since `set`; the tokens mean nothing
        self._suppressed = torch.zeros(n_vocab, dtype=torch.uint8)
        self._suppressed[list(suppress)] = SUPPRESSED.value
        self._suppressed = self._suppressed.to(device)
        for sequence in range(n_sequence):
            self.set(sequence, SamplingParams(temperature=0), 0, ())

    @torch.inference_mode()  # the tensors may have been made in it
    def set(self, sequence: int, params: SamplingParams, seed: int, history: Sequence[int]) -> None:
        """For a sequence that begins or changes. history: its tokens so far, the prompt's included.

        Not to be captured; graphs read the new values when they are replayed next.
        """
        self.temperature[sequence], self.top_k[sequence] = params.temperature, params.top_k
        self.top_p[sequence], self.min_p[sequence] = params.top_p, params.min_p
        self.penalty[sequence], self.seed[sequence], self.bad[sequence] = params.penalty, seed, 0
        ring = torch.full((WINDOW.value,), -1, dtype=torch.int32)
        for position in range(max(0, len(history) - WINDOW.value), len(history)):
            ring[position % WINDOW.value] = history[position]
        self.ring[sequence] = ring.to(self.ring.device)
        flags = self.flags[sequence]
        flags.copy_(self._suppressed)
        # A prompt may hold ids of padding rows, which are no tokens to draw
        recent = ring[(ring >= 0) & (ring < self.n_vocab)].unique().long().to(flags.device)
        flags[recent] |= RECENT.value


def sample(
    logits: Tensor, state: SamplerState, positions: Tensor, out: Tensor | None = None, *, variant: Variant
) -> Tensor:
    """Draws one token for each of the first sequences of `state`: int32 `[n_token]`, also added to their history.

    logits: f32 `[n_token, n_row]`; rows from `n_vocab` on are padding. positions: int32 `[n_token]`, the position of
    the token to be drawn, that is the number of tokens before it; below 1 the sequence is idle, and neither its
    `out` nor its state changes. Logits that are not finite set `state.bad`. variant: see `variant_for`.
    """
    (n_token, n_row), n_vocab = logits.shape, state.n_vocab
    assert n_token <= len(state.seed), (logits.shape, len(state.seed))
    assert n_vocab <= n_row, (logits.shape, n_vocab)
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.is_contiguous()
    out = torch.zeros(n_token, dtype=torch.int32, device=logits.device) if out is None else out
    for tensor in (positions, out):
        assert tensor.dtype == torch.int32, tensor.dtype
        assert tensor.numel() == n_token, (tensor.shape, n_token)
        assert tensor.is_contiguous()
    if n_token == 0:
        return out
    if n_vocab > FEW * _GROUP**3 and variant == "few":  # its blocks would not fit one program
        variant = "full"
    with torch.cuda.device_of(logits):
        {"greedy": _greedy, "few": _few, "full": _full}[variant](logits, state, positions, out)
    return out


def _maxima(logits: Tensor, state: SamplerState) -> tuple[Tensor, int]:
    """The greatest keys of all blocks, then of all groups: int64 `[n_token, n_key]`, and how many blocks there are."""
    n_token, n_block = len(logits), cdiv(state.n_vocab, _GROUP**2)
    n_key = n_block + cdiv(state.n_vocab, _GROUP)
    keys = torch.empty(n_token, n_key, dtype=torch.int64, device=logits.device)
    maxima_kernel[cdiv(n_block, _BLOCKS), n_token](
        logits,
        state.flags,
        state.penalty,
        keys,
        logits.shape[1],
        state.n_vocab,
        n_block,
        n_key,
        GROUP=_GROUP,
        BLOCKS=_BLOCKS,
    )
    return keys, n_block


def _greedy(logits: Tensor, state: SamplerState, positions: Tensor, out: Tensor) -> None:
    keys, n_block = _maxima(logits, state)
    greedy_kernel[len(logits),](
        keys,
        positions,
        out,
        state.bad,
        state.ring,
        state.flags,
        state.n_vocab,
        n_block,
        keys.shape[1],
        LANES=next_power_of_2(n_block),
    )


def _few(logits: Tensor, state: SamplerState, positions: Tensor, out: Tensor) -> None:
    keys, n_block = _maxima(logits, state)
    n_key, most = keys.shape[1], FEW * _GROUP  # candidates at a time
    few_kernel[len(logits),](
        logits,
        keys,
        positions,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        state.penalty,
        state.seed,
        out,
        state.bad,
        state.ring,
        state.flags,
        logits.shape[1],
        state.n_vocab,
        n_block,
        n_key,
        FIRST=2 if state.n_vocab <= most else 1 if n_key - n_block <= most else 0,
        LOG_GROUP=_GROUP.bit_length() - 1,
        LOG_K=FEW.bit_length() - 1,
        num_warps=_FEW_WARPS,
    )


def _full(logits: Tensor, state: SamplerState, positions: Tensor, out: Tensor) -> None:
    n_token, n_vocab = len(logits), state.n_vocab
    n_chunk = cdiv(n_vocab, _CHUNK)
    adjusted = torch.empty(n_token, n_vocab, device=logits.device)
    adjust_kernel[n_chunk, n_token](logits, state.flags, state.penalty, adjusted, logits.shape[1], n_vocab, TILE=_CHUNK)
    values, ids = adjusted.sort(dim=1, descending=True, stable=True)
    sums = torch.empty(n_token, 3, n_chunk, dtype=torch.float64, device=logits.device)
    sums_kernel[n_chunk, n_token](
        values, state.temperature, state.top_k, state.min_p, sums, n_vocab, N_CHUNK=n_chunk, CHUNK=_CHUNK
    )
    draw_kernel[n_token,](
        values,
        ids,
        sums,
        positions,
        state.temperature,
        state.top_k,
        state.top_p,
        state.seed,
        out,
        state.bad,
        state.ring,
        state.flags,
        n_vocab,
        N_CHUNK=n_chunk,
        CHUNK=_CHUNK,
        LANES=next_power_of_2(n_chunk),
    )
