"""The Triton kernels of `moe_decode`: gate and up with SiLU, then down with the sum over the experts."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from moe_engine.kernels.decode_activations_kernel import rounded, step_of, store_run
from moe_engine.kernels.decode_dots import fast_dots, unpacked_dots
from moe_engine.kernels.decode_overlap import let_next_kernel_start, wait_for_previous_kernel
from moe_engine.kernels.decode_units import unit_dot


@triton.jit
def gate_up_kernel(
    pool,
    slots,
    weights,
    x,
    codes,
    pairs,
    gate_table,
    up_table,
    h,
    h_codes,
    h_pairs,
    x_stride,
    SLOT_BYTES: tl.constexpr,
    TOP_K: tl.constexpr,
    N_IN: tl.constexpr,
    N_FF: tl.constexpr,
    UP_START: tl.constexpr,
    GATE: tl.constexpr,
    GATE_ALIGN: tl.constexpr,
    GATE_BLOCK_BYTES: tl.constexpr,
    GATE_RUN: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    GATE_UNITS: tl.constexpr,
    GATE_ROW_BYTES: tl.constexpr,
    UP: tl.constexpr,
    UP_ALIGN: tl.constexpr,
    UP_BLOCK_BYTES: tl.constexpr,
    UP_RUN: tl.constexpr,
    UP_WIDTH: tl.constexpr,
    UP_UNITS: tl.constexpr,
    UP_ROW_BYTES: tl.constexpr,
    OVERLAP: tl.constexpr,
    PLANES: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (p, i): rows `ROWS * i` and following of `weight * silu(gate x) * up x` for (token, choice) pair p.

    Pairs of one expert and the same rows run at about the same time: all but the first find the rows in the cache.
    """
    pair = tl.program_id(0) + wait_for_previous_kernel(OVERLAP)
    slot = tl.load(slots + pair)
    weight = tl.load(weights + pair)
    if slot < 0:
        return
    token = pair // TOP_K
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = pool + slot.to(tl.int64) * SLOT_BYTES
    inside = tl.minimum(row, N_FF - 1)
    gate_rows = expert + inside * GATE_ROW_BYTES
    up_rows = expert + UP_START + inside * UP_ROW_BYTES
    first = token * N_IN + tl.zeros([1], tl.int32)
    if GATE_ALIGN > 0 and UP_ALIGN > 0 and GATE_UNITS == UP_UNITS:
        # Both in one loop: twice the loads under way, and the activations are loaded once
        row_pointers = gate_rows[:, None, None], up_rows[:, None, None]
        source = codes + first[None, :, None], pairs + (first // 8)[None, :, None]
        lane = tl.arange(0, LANES)[None, None, :]
        g_total = tl.zeros([ROWS, 1, LANES], tl.float32)
        u_total = tl.zeros([ROWS, 1, LANES], tl.float32)
        for start in tl.range(0, GATE_UNITS, LANES, loop_unroll_factor=UNROLL):
            at = tl.minimum(start + lane, GATE_UNITS - 1)
            g_part = unit_dot(row_pointers[0], at, source[0], source[1], GATE, GATE_ALIGN)
            u_part = unit_dot(row_pointers[1], at, source[0], source[1], UP, UP_ALIGN)
            if GATE_UNITS % LANES != 0:
                g_part = tl.where(start + lane < GATE_UNITS, g_part, 0.0)
                u_part = tl.where(start + lane < GATE_UNITS, u_part, 0.0)
            g_total += g_part
            u_total += u_part
        g = tl.reshape(tl.sum(g_total, axis=2), [ROWS])
        u = tl.reshape(tl.sum(u_total, axis=2), [ROWS])
    else:
        if GATE_ALIGN > 0:
            g = fast_dots(
                gate_rows, codes + first, pairs + first // 8, GATE, GATE_ALIGN, GATE_UNITS, ROWS, 1, LANES, UNROLL
            )
            g = tl.reshape(g, [ROWS])
        else:
            own = x + token * x_stride
            g = unpacked_dots(gate_rows, own, gate_table, GATE, GATE_BLOCK_BYTES, GATE_RUN, GATE_WIDTH, N_IN, ROWS)
        if UP_ALIGN > 0:
            u = fast_dots(up_rows, codes + first, pairs + first // 8, UP, UP_ALIGN, UP_UNITS, ROWS, 1, LANES, UNROLL)
            u = tl.reshape(u, [ROWS])
        else:
            own = x + token * x_stride
            u = unpacked_dots(up_rows, own, up_table, UP, UP_BLOCK_BYTES, UP_RUN, UP_WIDTH, N_IN, ROWS)
    let_next_kernel_start(OVERLAP)  # not sooner: its programs would crowd onto the first multiprocessors with room
    # The sigmoid from the exponential of a negative number: no overflow
    small = tl.exp(-tl.abs(g))
    y = g * (tl.where(g >= 0, 1.0, small) / (1.0 + small)) * u
    if QUANTIZE:
        y = tl.reshape(y, [ROWS // 16, 16])
        run = tl.program_id(1) * (ROWS // 16) + tl.arange(0, ROWS // 16)
        fits = run < N_FF // 16
        scale, inverse = step_of(y)
        y *= inverse[:, None]
        q = rounded(y)
        run += pair * (N_FF // 16)
        store_run(h_codes, h_pairs, q, scale * weight, run, fits)
        if PLANES == 2:
            # What rounding left, in a second plane of codes
            rest = rounded((y - q.to(tl.float32)) * 254.0)
            run += tl.num_programs(0) * (N_FF // 16)
            store_run(h_codes, h_pairs, rest, scale * weight / 254.0, run, fits)
    else:
        tl.store(h + pair * N_FF + row, y * weight, mask=row < N_FF)


@triton.jit(do_not_specialize=["n_token"])
def down_kernel(
    pool,
    slots,
    h_codes,
    h_pairs,
    residual,
    out,
    n_token,
    SLOT_BYTES: tl.constexpr,
    TOP_K: tl.constexpr,
    START: tl.constexpr,
    N_FF: tl.constexpr,
    N_OUT: tl.constexpr,
    DOWN: tl.constexpr,
    ALIGN: tl.constexpr,
    N_UNIT: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    OVERLAP: tl.constexpr,
    PLANES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (t, i): rows `ROWS * i` and following of token t's output.

    Each choice has WIDTH of the lanes to itself; with WIDTH 0 all lanes take the same choice. Where an expert's row
    does not fill them, the units of a row in all used experts are then one long row, dealt out to the lanes.
    """
    token = tl.program_id(0) + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_offset = (START + tl.minimum(row, N_OUT - 1) * ROW_BYTES).to(tl.int64)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    total = tl.zeros([ROWS, 1, LANES], tl.float32)
    zero = tl.zeros([1, 1, 1], tl.int32)
    if WIDTH > 0:
        choice = lane // WIDTH
        pair = token * TOP_K + choice
        slot = tl.load(slots + pair, mask=choice < TOP_K, other=-1)
        some = tl.max(slot)
        if some >= 0:
            # Lanes without an expert read what others do anyway
            rows = pool + tl.where(slot >= 0, slot, some).to(tl.int64) * SLOT_BYTES + row_offset
            source = tl.where(slot >= 0, pair, token * TOP_K)
            for start in tl.range(0, N_UNIT, WIDTH, loop_unroll_factor=UNROLL):
                at = start + lane % WIDTH
                u = at if N_UNIT % WIDTH == 0 else tl.minimum(at, N_UNIT - 1)
                y = unit_dot(rows, u, h_codes + source * N_FF, h_pairs + source * (N_FF // 8), DOWN, ALIGN)
                if PLANES == 2:  # the same weights: they are loaded and decoded once
                    rest = source + n_token * TOP_K
                    y += unit_dot(rows, u, h_codes + rest * N_FF, h_pairs + rest * (N_FF // 8), DOWN, ALIGN)
                total += tl.where((slot >= 0) & (at < N_UNIT), y, 0.0)
    elif N_UNIT % LANES == 0:  # all lanes are in the same expert
        for choice in range(TOP_K):
            pair = token * TOP_K + choice
            slot = tl.load(slots + pair)
            if slot >= 0:
                rows = pool + slot.to(tl.int64) * SLOT_BYTES + row_offset
                for start in tl.range(0, N_UNIT, LANES, loop_unroll_factor=UNROLL):
                    source = pair + zero
                    codes, pairs = h_codes + source * N_FF, h_pairs + source * (N_FF // 8)
                    total += unit_dot(rows, start + lane, codes, pairs, DOWN, ALIGN)
                    if PLANES == 2:  # the same weights: they are loaded and decoded once
                        source += n_token * TOP_K
                        codes, pairs = h_codes + source * N_FF, h_pairs + source * (N_FF // 8)
                        total += unit_dot(rows, start + lane, codes, pairs, DOWN, ALIGN)
    else:
        n_used = 0
        for choice in tl.static_range(TOP_K):
            n_used += (tl.load(slots + token * TOP_K + choice) >= 0).to(tl.int32)
        n_unit = n_used * N_UNIT
        for start in tl.range(0, n_unit, LANES, loop_unroll_factor=UNROLL):
            at = tl.minimum(start + lane, n_unit - 1)
            # The slot of the lane's used choice, and its pair
            index = at // N_UNIT
            slot = tl.zeros([1, 1, LANES], tl.int32)
            pair = slot
            passed = 0
            for choice in tl.static_range(TOP_K):
                candidate = tl.load(slots + token * TOP_K + choice)
                here = (index == passed) & (candidate >= 0)
                slot = tl.where(here, candidate, slot)
                pair = tl.where(here, token * TOP_K + choice, pair)
                passed += (candidate >= 0).to(tl.int32)
            rows = pool + slot.to(tl.int64) * SLOT_BYTES + row_offset
            u = at % N_UNIT
            source = pair + zero
            y = unit_dot(rows, u, h_codes + source * N_FF, h_pairs + source * (N_FF // 8), DOWN, ALIGN)
            if PLANES == 2:  # the same weights: they are loaded and decoded once
                source += n_token * TOP_K
                y += unit_dot(rows, u, h_codes + source * N_FF, h_pairs + source * (N_FF // 8), DOWN, ALIGN)
            total += tl.where(start + lane < n_unit, y, 0.0)
    y = tl.reshape(tl.sum(total, axis=2), [ROWS])
    if RESIDUAL:
        y += tl.load(residual + token * N_OUT + row, mask=row < N_OUT, other=0.0)
    tl.store(out + token * N_OUT + row, y, mask=row < N_OUT)


@triton.jit
def down_unpacked_kernel(
    pool,
    slots,
    h,
    table,
    residual,
    out,
    SLOT_BYTES: tl.constexpr,
    TOP_K: tl.constexpr,
    START: tl.constexpr,
    N_FF: tl.constexpr,
    N_OUT: tl.constexpr,
    DOWN: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    N_RUN: tl.constexpr,
    RUN_WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    OVERLAP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (t, i): rows `ROWS * i` and following of token t's output, unpacked to f32."""
    token = tl.program_id(0) + wait_for_previous_kernel(OVERLAP)
    let_next_kernel_start(OVERLAP)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_offset = START + tl.minimum(row, N_OUT - 1) * ROW_BYTES
    total = tl.zeros([ROWS], tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        slot = tl.load(slots + pair)
        if slot >= 0:
            rows = pool + slot.to(tl.int64) * SLOT_BYTES + row_offset
            total += unpacked_dots(rows, h + pair * N_FF, table, DOWN, BLOCK_BYTES, N_RUN, RUN_WIDTH, N_FF, ROWS)
    if RESIDUAL:
        total += tl.load(residual + token * N_OUT + row, mask=row < N_OUT, other=0.0)
    tl.store(out + token * N_OUT + row, total, mask=row < N_OUT)
