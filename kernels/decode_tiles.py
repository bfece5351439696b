"""How the decode products are cut into programs: constants and the measurements that chose them.

Measured on an H200 in CUDA graphs. Experts: microseconds for 8 of 2048x768 Q4_K, and percent of the copy bandwidth for
8 of 7168x2048 Q4_K.
"""

from typing import Any

from moe_engine.kernels.dequantize import _is_interpreted

# The interpreter's time goes by operation, not by element.
_INTERPRETER_TILE: dict[str, Any] = {"ROWS": 128, "LANES": 16, "UNROLL": 1, "num_warps": 1}


def matvec_tile(n_token: int, n_row: int) -> dict[str, Any]:
    if _is_interpreted():
        return _INTERPRETER_TILE | {"TOKENS": 2}
    if n_token > 1:
        # One warp a program: tokens and rows then stay in a lane's registers. 151936x2048 Q6_K, 4 tokens on an H200:
        # 119 us; with 4 rows 141, with 2 tokens 165.
        return {"ROWS": 8, "TOKENS": 2 if n_token == 2 else 4, "LANES": 32, "UNROLL": 1, "num_warps": 1}
    if n_row < 16384:  # few programs: a row each warp. Not tuned
        return {"ROWS": 4, "TOKENS": 1, "LANES": 32, "UNROLL": 4, "num_warps": 4}
    # The same matrix, one token: 77 us; with 8 rows 92, with 8 warps 94
    return {"ROWS": 16, "TOKENS": 1, "LANES": 32, "UNROLL": 1, "num_warps": 4}


def unpacked_tile(n_row: int = 4) -> dict[str, Any]:
    """For types without a fast path. Not tuned."""
    return _INTERPRETER_TILE if _is_interpreted() else {"ROWS": n_row, "LANES": 32, "UNROLL": 1, "num_warps": 4}


def gate_up_tile() -> dict[str, Any]:
    if _is_interpreted():
        return _INTERPRETER_TILE
    # 16 rows make a run of the quantized result. The kernel alone: 6.7 us; with 4 warps 7.3, with 64 lanes 7.2, with
    # two loop turns at once 7.3, with 16 warps 8.3.
    return {"ROWS": 16, "LANES": 32, "UNROLL": 1, "num_warps": 8}


def down_tile(n_unit: int) -> dict[str, Any]:
    if _is_interpreted():
        return _INTERPRETER_TILE
    if n_unit % 64 and n_unit % 32 == 0:  # lanes of one expert then, which is faster. Not tuned further
        return {"ROWS": 8, "LANES": 32, "UNROLL": 1, "num_warps": 4}
    # Whole product: 13.3 us and 73 %. Before the loop had its present form all were equal: 13.0 us with (4, 64, 4
    # warps), 72 % with (8, 32, two turns at once, 4 warps).
    return {"ROWS": 8, "LANES": 64, "UNROLL": 1, "num_warps": 8}
