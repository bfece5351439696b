"""How the decode products are cut into programs: constants and the measurements that chose them.

Measured on an H200 in CUDA graphs. Experts: microseconds for 8 of 2048x768 Q4_K, and percent of the copy bandwidth for
8 of 7168x2048 Q4_K.
"""

from typing import Any

from moe_engine.kernels.device import is_interpreted

# The interpreter's time goes by operation, not by element.
_INTERPRETER_TILE: dict[str, Any] = {"ROWS": 256, "LANES": 16, "UNROLL": 1, "num_warps": 1}


FEW_ROWS = 16384
"""Matrices of fewer rows do not keep the GPU busy for long: what counts is how many programs read them at once."""


def matvec_tile(n_token: int, n_row: int, n_unit: int, align: int, quantize: bool = False) -> dict[str, Any]:
    """n_unit: units of a row. align: of the blocks. quantize: the result's rows must come in runs of 16."""
    if is_interpreted():
        return _INTERPRETER_TILE | {"TOKENS": 2 if n_token < 5 else 16, "PREFETCH": True}
    few = n_row < FEW_ROWS
    if n_token > 1:
        # One warp a program: tokens and rows then stay in a lane's registers. 151936x2048 and 4 tokens, 8 or 4 rows:
        # Q6_K 115 or 133 us, Q4_K (16-byte loads) 89 or 70. Q, k and v of Qwen3, 4, 8 and 16 tokens: 5.4, 8.1 and
        # 12.6 us with 4 rows, 6.0 (4 tokens) with 8, 6.2, 10.0 and 16.7 with 2; 8 tokens a program 9.7, 9.8 and 13.5.
        n = 4 if align == 16 or (few and n_token > 2) else 8
        rows = {"ROWS": 16, "num_warps": 2} if quantize else {"ROWS": n, "num_warps": 1}
        prefetch = few or (align == 16 and not quantize)
        return rows | {"TOKENS": 2 if n_token == 2 else 4, "LANES": 32, "UNROLL": 1, "PREFETCH": prefetch}
    lanes = min(32, 1 << (n_unit - 1).bit_length())
    if n_unit % lanes and n_unit < 4 * lanes:  # fewer lanes that idle at the end of a row
        lanes //= 2
    if few:  # few programs: a row each warp, more where rows are short. Two rows, or eight, were slower or equal
        n = max(16 if quantize else 4, 128 // lanes)
        tile = {"ROWS": n, "LANES": lanes, "num_warps": n * lanes // 32}
        return tile | {"TOKENS": 1, "UNROLL": 4, "PREFETCH": True}
    # 151936x2048 Q6_K: 77 us; with 8 rows 92, with 8 warps 94
    return {"ROWS": 512 // lanes, "TOKENS": 1, "LANES": lanes, "UNROLL": 1, "num_warps": 4, "PREFETCH": False}


def matvec_on_tensor_cores(n_token: int, n_row: int, n_in: int, n_unit: int) -> dict[str, Any] | None:
    """None: not with this few tokens or rows (of more than a turn), or with rows of this length.

    Q8_0 has small units, so it comes later.
    """
    lanes = 4
    if n_token < (5 if n_in >= 32 * n_unit else 9) or n_unit % lanes or (n_row < FEW_ROWS and n_unit > lanes):
        return None
    # 151936x2048, 8 and 16 tokens: Q4_K 95 and 103 us, in 8-bit integers 132 and 305; Q6_K 155 and 165 (218, 420);
    # Q8_0 217 and 228 (157, -). With the asynchronous copies of two stages Q4_K takes 249 and 142: they go past the
    # first cache, and all programs want the same activations. With prefetching 111 and 121.
    rows = 256 if is_interpreted() else 64
    tile = {"ROWS": rows, "TOKENS": 16, "LANES": lanes, "UNROLL": 1, "PREFETCH": False}
    return tile | {"num_warps": 4, "num_stages": 1}


def unpacked_tile(n_row: int = 4) -> dict[str, Any]:
    """For types without a fast path. Not tuned."""
    return _INTERPRETER_TILE if is_interpreted() else {"ROWS": n_row, "LANES": 32, "UNROLL": 1, "num_warps": 4}


def gate_up_tile() -> dict[str, Any]:
    if is_interpreted():
        return _INTERPRETER_TILE
    # 16 rows make a run of the quantized result. The kernel alone: 6.7 us; with 4 warps 7.3, with 64 lanes 7.2, with
    # two loop turns at once 7.3, with 16 warps 8.3.
    return {"ROWS": 16, "LANES": 32, "UNROLL": 1, "num_warps": 8}


def down_tile(n_token: int, top_k: int, n_unit: int) -> dict[str, Any]:
    """WIDTH: see `down_kernel`."""
    if n_token >= 4 and top_k > 1 and n_unit % 64:
        width = 8 if n_unit % 8 == 0 else 4
        lanes = width * (1 << (top_k - 1).bit_length())
        if is_interpreted():
            return _INTERPRETER_TILE | {"LANES": lanes, "WIDTH": width}
        # Whole product of 8 of 128 experts for 4, 8 and 16 tokens: Q4_K 32.5, 54.7 and 93 us, Q6_K 47, 83 and 152;
        # with twice the warps 33.9, 58 and 101, 50, 90 and 167; the long row below 33.8, 58 and 104, 51, 89 and 159.
        return {"WIDTH": width, "ROWS": 8, "LANES": lanes, "UNROLL": 3, "num_warps": max(1, lanes // 16)}
    if is_interpreted():
        return _INTERPRETER_TILE | {"WIDTH": 0}
    if n_unit % 64 and n_unit % 32 == 0:  # lanes of one expert then, which is faster. Not tuned further
        return {"WIDTH": 0, "ROWS": 8, "LANES": 32, "UNROLL": 1, "num_warps": 4}
    # Whole product: 13.3 us and 73 %. Before the loop had its present form all were equal: 13.0 us with (4, 64, 4
    # warps), 72 % with (8, 32, two turns at once, 4 warps).
    return {"WIDTH": 0, "ROWS": 8, "LANES": 64, "UNROLL": 1, "num_warps": 8}
