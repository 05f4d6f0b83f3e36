"""Triton kernels of the selective scan; import only where triton is installed.

A program owns one batch row and a block of channels, and walks over tiles of T tokens. Within a tile everything is an
array (T, R, E, P): the N states of a channel are spread over P lanes with R consecutive states each. Triton gives the
lanes of a warp to the last axes first, P and then E, and warps to what is left of E, so that T and R lie in the
registers of one thread: the scan over T and the sum over R need no communication.

Suffixes spell shapes: T tokens of a tile, E channels of a block, N = P R states, L length. Steps, states, and
everything computed from them are float32. Numbers of equations are those of README.md one folder up; names beginning
with d are gradients.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.selective_scan.triton.tiles import (
    LOG2_E,
    adjoint_scan,
    block_of_program,
    coefficients,
    load_channels,
    load_matrix,
    load_sequence,
    load_starts,
    load_state,
    matrix_tile,
    per_state,
    scan,
    sigmoid,
    state_index,
    state_tile,
    step_size,
    store_matrix,
    store_sequence,
    sum_states,
    through_coefficients,
    through_gate,
)


@triton.jit
@no_type_check
def forward(
    x,
    dt,
    z,
    A,
    B,
    C,
    D,
    dt_bias,
    initial_state,
    segment_ids,
    y,
    final_state,
    checkpoints,
    BATCH: tl.constexpr,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    B_GROUPS: tl.constexpr,
    C_GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ZOH: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_CHECKPOINTS: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Equations 1 to 6: writes y (B, L, E), final_state (B, E, N) and checkpoints (B, chunks, E, N).

    A checkpoint is the state before a chunk of CHUNK tiles. Pointers of absent arguments are not read. B_GROUPS and
    C_GROUPS are 0 for a matrix that is constant over time.
    """
    row, group, _block, channel_E, exists_E = block_of_program(CHANNELS, GROUPS, E)
    state_REP, is_state_REP = state_tile(channel_E, exists_E, STATES, R, P)
    A_REP = load_state(A + state_REP, is_state_REP) * LOG2_E
    D_E = load_channels(D, channel_E, exists_E, HAS_D)
    bias_E = load_channels(dt_bias, channel_E, exists_E, HAS_BIAS)
    # The state, equation 4: it stays in registers from the first token to the last.
    h_REP = tl.zeros_like(A_REP)
    if HAS_INITIAL:
        h_REP = load_state(initial_state + row * CHANNELS * STATES + state_REP, is_state_REP)
    tiles: tl.constexpr = (LENGTH + T - 1) // T
    chunks: tl.constexpr = (tiles + CHUNK - 1) // CHUNK
    time_T = tl.arange(0, T)

    # Every load is issued a tile ahead of its use. Adding row * 0 makes the token's index 64 bits wide.
    first = row * 0
    x_TE = load_sequence(x, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    dt_TE = load_sequence(dt, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    # A variable of the loop needs a value even if it is not used.
    z_TE = x_TE
    if HAS_Z:
        z_TE = load_sequence(z, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    B_tile = load_matrix(B, row, first, group, state_REP, is_state_REP, LENGTH, STATES, B_GROUPS, T, R, P)
    C_tile = load_matrix(C, row, first, group, state_REP, is_state_REP, LENGTH, STATES, C_GROUPS, T, R, P)
    starts_T = load_starts(segment_ids, row, first, LENGTH, T, HAS_SEGMENTS)
    for tile in tl.range(0, tiles):
        first = row * 0 + tile * T
        next_first = first + T
        next_x_TE = load_sequence(x, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
        next_dt_TE = load_sequence(dt, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
        next_z_TE = next_x_TE
        if HAS_Z:
            next_z_TE = load_sequence(z, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
        next_B = load_matrix(B, row, next_first, group, state_REP, is_state_REP, LENGTH, STATES, B_GROUPS, T, R, P)
        next_C = load_matrix(C, row, next_first, group, state_REP, is_state_REP, LENGTH, STATES, C_GROUPS, T, R, P)
        next_starts_T = load_starts(segment_ids, row, next_first, LENGTH, T, HAS_SEGMENTS)
        # The state before a chunk, from which the backward kernel starts.
        if HAS_CHECKPOINTS and tile % CHUNK == 0:
            place = (row * chunks + tile // CHUNK) * CHANNELS * STATES
            tl.store(checkpoints + place + state_REP, h_REP, mask=is_state_REP)

        # Equation 1. Past the end steps are zero: a is 1 and u is 0 there, so the state stays as it is.
        valid_T = first + time_T < LENGTH
        x32_TE = x_TE.to(tl.float32)
        step_TE, _slope_TE = step_size(dt_TE, bias_E, valid_T, SOFTPLUS)
        a_TREP, u_TREP, _gain_TREP, _step_T1E1, _inflow_T1E1 = coefficients(
            x32_TE, step_TE, A_REP, B_tile, starts_T, B_GROUPS, ZOH, HAS_SEGMENTS
        )
        # Equations 4, 5 and 6.
        _before_TREP, after_TREP, h_REP = scan(a_TREP, u_TREP, h_REP, T)
        y_TE = sum_states(after_TREP * matrix_tile(C_tile, C_GROUPS)) + D_E[None] * x32_TE
        if HAS_Z:
            z32_TE = z_TE.to(tl.float32)
            y_TE = y_TE * (z32_TE * sigmoid(z32_TE))
        store_sequence(y, y_TE, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
        x_TE, dt_TE, z_TE, starts_T = next_x_TE, next_dt_TE, next_z_TE, next_starts_T
        B_tile, C_tile = next_B, next_C
    tl.store(final_state + row * CHANNELS * STATES + state_REP, h_REP, mask=is_state_REP)


@triton.jit
@no_type_check
def backward(
    x,
    dt,
    z,
    A,
    B,
    C,
    D,
    dt_bias,
    segment_ids,
    checkpoints,
    dy,
    dfinal_state,
    dx,
    ddt,
    dz,
    dA,
    dB,
    dC,
    dD,
    ddt_bias,
    dinitial_state,
    scratch,
    BATCH: tl.constexpr,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    B_GROUPS: tl.constexpr,
    C_GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ZOH: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Equations 8 to 20: writes the gradients, chunk by chunk from the end.

    A chunk's states at the starts of its tiles are recomputed from its checkpoint into scratch (programs, CHUNK, E, N);
    the tiles then follow in reverse. dx, ddt, dz are (B, L, E); dA, dinitial_state, and dB and dC of constant matrices,
    (B, E, N), dD and ddt_bias (B, E), to be summed over rows. dB and dC of other matrices are (F / E, B, L, G, N), the
    part of every block of a group's F channels.
    """
    row, group, block, channel_E, exists_E = block_of_program(CHANNELS, GROUPS, E)
    state_REP, is_state_REP = state_tile(channel_E, exists_E, STATES, R, P)
    A_REP = load_state(A + state_REP, is_state_REP) * LOG2_E
    D_E = load_channels(D, channel_E, exists_E, HAS_D)
    bias_E = load_channels(dt_bias, channel_E, exists_E, HAS_BIAS)
    of_row = row * CHANNELS * STATES
    chunks: tl.constexpr = (LENGTH + T * CHUNK - 1) // (T * CHUNK)
    time_T = tl.arange(0, T)
    # Where a lane keeps a state in scratch: laid out for this program alone, so every lane reads what it wrote itself.
    kept_REP = tl.arange(0, E)[None, :, None] * (R * P) + state_index(R, P)
    kept_REP += tl.program_id(0).to(tl.int64) * (CHUNK * E * R * P)

    # g of equation 10: what the tokens from a tile on contribute to the gradient of the state before it.
    carry_REP = load_state(dfinal_state + of_row + state_REP, is_state_REP)
    # Sums over time; those of D and the bias keep the tokens of a tile apart, and are added at the very end.
    dA_REP = tl.zeros_like(A_REP)
    dB_REP = tl.zeros_like(A_REP)
    dC_REP = tl.zeros_like(A_REP)
    dD_TE = tl.zeros((T, E), tl.float32)
    ddt_bias_TE = tl.zeros((T, E), tl.float32)

    first = row * 0 + (chunks * CHUNK - 1) * T
    x_TE = load_sequence(x, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    dt_TE = load_sequence(dt, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    dy_TE = load_sequence(dy, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    z_TE = x_TE
    if HAS_Z:
        z_TE = load_sequence(z, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    B_tile = load_matrix(B, row, first, group, state_REP, is_state_REP, LENGTH, STATES, B_GROUPS, T, R, P)
    C_tile = load_matrix(C, row, first, group, state_REP, is_state_REP, LENGTH, STATES, C_GROUPS, T, R, P)
    starts_T = load_starts(segment_ids, row, first, LENGTH, T, HAS_SEGMENTS)
    for chunk_from_end in tl.range(0, chunks):
        # First stage: equation 4 again, from the chunk's checkpoint, keeping the state before each of its tiles.
        chunk = chunks - 1 - chunk_from_end
        first_tile = chunk * CHUNK
        h_REP = load_state(checkpoints + (row * chunks + chunk) * CHANNELS * STATES + state_REP, is_state_REP)
        tl.store(scratch + kept_REP, h_REP)
        # Here the loads are issued a tile ahead too.
        first = row * 0 + first_tile * T
        early_x_TE = load_sequence(x, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
        early_dt_TE = load_sequence(dt, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
        early_B = load_matrix(B, row, first, group, state_REP, is_state_REP, LENGTH, STATES, B_GROUPS, T, R, P)
        early_starts_T = load_starts(segment_ids, row, first, LENGTH, T, HAS_SEGMENTS)
        for index in tl.range(1, CHUNK):
            first = row * 0 + (first_tile + index - 1) * T
            next_first = first + T
            next_early_x_TE = load_sequence(x, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
            next_early_dt_TE = load_sequence(dt, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
            next_early_B = load_matrix(
                B, row, next_first, group, state_REP, is_state_REP, LENGTH, STATES, B_GROUPS, T, R, P
            )
            next_early_starts_T = load_starts(segment_ids, row, next_first, LENGTH, T, HAS_SEGMENTS)
            step_TE, _slope_TE = step_size(early_dt_TE, bias_E, first + time_T < LENGTH, SOFTPLUS)
            x32_TE = early_x_TE.to(tl.float32)
            a_TREP, u_TREP, _gain_TREP, _step_T1E1, _inflow_T1E1 = coefficients(
                x32_TE, step_TE, A_REP, early_B, early_starts_T, B_GROUPS, ZOH, HAS_SEGMENTS
            )
            _before_TREP, _after_TREP, h_REP = scan(a_TREP, u_TREP, h_REP, T)
            tl.store(scratch + kept_REP + index * (E * R * P), h_REP)
            early_x_TE, early_dt_TE, early_starts_T = next_early_x_TE, next_early_dt_TE, next_early_starts_T
            early_B = next_early_B
        # Scratch is global memory: its stores must be visible before the loads below, which Triton does not see to.
        tl.debug_barrier()

        # Second stage: the tiles of the chunk in reverse.
        for index_from_end in tl.range(0, CHUNK):
            index = CHUNK - 1 - index_from_end
            first = row * 0 + (first_tile + index) * T
            next_first = tl.maximum(first - T, 0)
            h_REP = load_state(scratch + kept_REP + index * (E * R * P), is_state_REP)
            next_x_TE = load_sequence(x, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
            next_dt_TE = load_sequence(dt, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
            next_dy_TE = load_sequence(dy, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
            next_z_TE = next_x_TE
            if HAS_Z:
                next_z_TE = load_sequence(z, row, next_first, channel_E, exists_E, LENGTH, CHANNELS, T)
            next_B = load_matrix(B, row, next_first, group, state_REP, is_state_REP, LENGTH, STATES, B_GROUPS, T, R, P)
            next_C = load_matrix(C, row, next_first, group, state_REP, is_state_REP, LENGTH, STATES, C_GROUPS, T, R, P)
            next_starts_T = load_starts(segment_ids, row, next_first, LENGTH, T, HAS_SEGMENTS)

            x32_TE = x_TE.to(tl.float32)
            step_TE, slope_TE = step_size(dt_TE, bias_E, first + time_T < LENGTH, SOFTPLUS)
            B_TREP = matrix_tile(B_tile, B_GROUPS)
            C_TREP = matrix_tile(C_tile, C_GROUPS)
            a_TREP, u_TREP, gain_TREP, step_T1E1, inflow_T1E1 = coefficients(
                x32_TE, step_TE, A_REP, B_tile, starts_T, B_GROUPS, ZOH, HAS_SEGMENTS
            )
            before_TREP, after_TREP, h_REP = scan(a_TREP, u_TREP, h_REP, T)

            # Equations 8, 9 and 19.
            dout_TE = dy_TE.to(tl.float32)
            if HAS_Z:
                out_TE = sum_states(after_TREP * C_TREP) + D_E[None] * x32_TE
                dout_TE, dz_TE = through_gate(dout_TE, out_TE, z_TE)
                store_sequence(dz, dz_TE, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
            dD_TE += dout_TE * x32_TE
            dout_T1E1 = per_state(dout_TE)

            # Equations 10 and 11: du is dh_t, the gradient of u_t and of the state after a token, flow is g_{t-1}.
            du_TREP, flow_TREP, carry_REP = adjoint_scan(a_TREP, dout_T1E1 * C_TREP, carry_REP, T)
            dx_TE, dstep_TE, dA_TREP, dB_TREP = through_coefficients(
                flow_TREP * before_TREP, du_TREP, x32_TE, step_TE, A_REP, B_TREP, gain_TREP, step_T1E1, inflow_T1E1, ZOH
            )
            # Equation 14 for C; `store_matrix` sums it over the channels, in a fixed order.
            dC_TREP = dout_T1E1 * after_TREP
            # Equation 16's skip, then 18.
            dx_TE += D_E[None] * dout_TE
            ddt_TE = dstep_TE * slope_TE
            ddt_bias_TE += ddt_TE
            dA_REP += tl.sum(dA_TREP, axis=0)
            store_sequence(dx, dx_TE, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
            store_sequence(ddt, ddt_TE, row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
            if B_GROUPS == 0:
                dB_REP += tl.sum(dB_TREP, axis=0)
            else:
                store_matrix(dB, dB_TREP, row, first, group, block, BATCH, LENGTH, STATES, GROUPS, T, R, P)
            if C_GROUPS == 0:
                dC_REP += tl.sum(dC_TREP, axis=0)
            else:
                store_matrix(dC, dC_TREP, row, first, group, block, BATCH, LENGTH, STATES, GROUPS, T, R, P)
            x_TE, dt_TE, dy_TE, z_TE, starts_T = next_x_TE, next_dt_TE, next_dy_TE, next_z_TE, next_starts_T
            B_tile, C_tile = next_B, next_C
        # The next chunk overwrites scratch.
        tl.debug_barrier()

    # g_0 of equation 11, and the sums over time: one row for each batch row, which the caller adds up.
    tl.store(dinitial_state + of_row + state_REP, carry_REP, mask=is_state_REP)
    tl.store(dA + of_row + state_REP, dA_REP, mask=is_state_REP)
    if B_GROUPS == 0:
        tl.store(dB + of_row + state_REP, dB_REP, mask=is_state_REP)
    if C_GROUPS == 0:
        tl.store(dC + of_row + state_REP, dC_REP, mask=is_state_REP)
    if HAS_D:
        tl.store(dD + row * CHANNELS + channel_E, tl.sum(dD_TE, axis=0), mask=exists_E)
    if HAS_BIAS:
        tl.store(ddt_bias + row * CHANNELS + channel_E, tl.sum(ddt_bias_TE, axis=0), mask=exists_E)
