"""The kernel of the Mamba-1 step that advances the recurrence; import only where triton is installed.

A program owns M batch rows and a block of E channels with all their states. Suffixes spell shapes: M rows, E channels
of a block, N states, R terms of dt, P parts of the x-projection.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.common.triton.products import scaled
from pallas_kernels.selective_scan.triton.equations import sigmoid, step_size
from pallas_kernels.selective_scan.triton.tiles import LOG2_E


@triton.jit
@no_type_check
def advance(parts, dt_proj, dt_proj_scale, dt_bias, A_log, D, x, z, state, y, new_state, constants: tl.constexpr):
    """dt-projection, step, gate: y (ROWS, E), and the state (ROWS, E, N) in place of the old one.

    The x-projection comes in parts (PARTS, ROWS, R + 2 N), which are added in a fixed order.
    """
    program = tl.program_id(0)
    row_M = (program // constants.blocks).to(tl.int64) * constants.M + tl.arange(0, constants.M)
    is_row_M = row_M < constants.ROWS
    channel_E = program % constants.blocks * constants.CHANNELS + tl.arange(0, constants.CHANNELS)
    exists_E = channel_E < constants.E
    state_N = tl.arange(0, constants.STATES)
    # What does not wait for the x-projection is loaded first.
    matrix_EN = channel_E[:, None] * constants.N + state_N[None]
    is_state_EN = exists_E[:, None] & (state_N < constants.N)[None]
    place_MEN = row_M[:, None, None] * (constants.E * constants.N) + matrix_EN[None]
    is_state_MEN = is_row_M[:, None, None] & is_state_EN[None]
    state_MEN = tl.load(state + place_MEN, mask=is_state_MEN, other=0.0).to(tl.float32)
    # Made here: within a loop XLA would make A from its logarithm anew, by another launch, for every token.
    A_EN = tl.load(A_log + matrix_EN, mask=is_state_EN, other=0.0).to(tl.float32) * LOG2_E
    A_EN = tl.exp2(A_EN) * -LOG2_E
    mask_ME = is_row_M[:, None] & exists_E[None]
    place_ME = row_M[:, None] * constants.E + channel_E[None]
    x_ME = tl.load(x + place_ME, mask=mask_ME, other=0.0).to(tl.float32)
    z_ME = tl.load(z + place_ME, mask=mask_ME, other=0.0).to(tl.float32)
    D_E = tl.load(D + channel_E, mask=exists_E, other=0.0).to(tl.float32)
    bias_E = tl.load(dt_bias + channel_E, mask=exists_E, other=0.0).to(tl.float32)

    # Loads wait for nobody: all are under way before the first sum, which threads wait for each other in.
    B = load_selection(parts, row_M, constants.R, state_N, constants.N, constants)
    C = load_selection(parts, row_M, constants.R + constants.N, state_N, constants.N, constants)
    if constants.HAS_DT:
        dt_ME = tl.load(dt_proj + place_ME, mask=mask_ME, other=0.0).to(tl.float32)
    else:
        dt_ME = dt_of_row(parts, dt_proj, dt_proj_scale, row_M, channel_E, exists_E, y.dtype.element_ty, constants)
    B_MN = finish_selection(B, y.dtype.element_ty, constants).to(tl.float32)
    C_MN = finish_selection(C, y.dtype.element_ty, constants).to(tl.float32)
    # Rounded as the layer's output is.
    dt_ME = dt_ME.to(y.dtype.element_ty)
    step_ME, _slope_ME = step_size(dt_ME, bias_E, is_row_M, True)
    decay_MEN = tl.exp2(step_ME[:, :, None] * A_EN[None])
    state_MEN = decay_MEN * state_MEN + (step_ME * x_ME)[:, :, None] * B_MN[:, None]
    y_ME = tl.sum(state_MEN * C_MN[:, None], axis=2) + D_E[None] * x_ME
    y_ME = y_ME * z_ME * sigmoid(z_ME)
    tl.store(new_state + place_MEN, state_MEN.to(new_state.dtype.element_ty), mask=is_state_MEN)
    tl.store(y + place_ME, y_ME.to(y.dtype.element_ty), mask=mask_ME)


@triton.jit
@no_type_check
def dt_of_row(parts, dt_proj, dt_proj_scale, row_M, channel_E, exists_E, dtype: tl.constexpr, constants: tl.constexpr):
    """(1, E), the dt-projection of one row in float32, without matrix units, which want 16 of them."""
    dt_ME = tl.full((constants.M, constants.CHANNELS), 0.0, tl.float32)
    LOADS: tl.constexpr = constants.ranks
    for index in tl.static_range(LOADS):
        rank_R = index * constants.RANK + tl.arange(0, constants.RANK)
        mask_RE = (rank_R < constants.R)[:, None] & exists_E[None]
        weight_RE = tl.load(dt_proj + rank_R[:, None] + channel_E[None] * constants.R, mask=mask_RE, other=0.0)
        dt = load_selection(parts, row_M, 0, rank_R, constants.R, constants)
        dt_MR = finish_selection(dt, dtype, constants)
        dt_R1 = tl.sum(dt_MR.to(tl.float32), axis=0)[:, None]
        dt_ME += tl.sum(dt_R1 * weight_RE.to(tl.float32), axis=0)[None]
    return scaled(dt_ME, dt_proj, dt_proj_scale, channel_E, exists_E)


@triton.jit
@no_type_check
def load_selection(parts, row_M, offset, column_R, last, constants: tl.constexpr):
    """Columns of the x-projection from `offset` on for `finish_selection`: of one row its parts (P, 1, R), else (M, R).

    One row is so little that a program holds all its parts, which its threads load at the same time. More rows come
    added up.
    """
    place_MR = row_M[:, None] * constants.selection + offset + column_R[None]
    mask_MR = (row_M < constants.ROWS)[:, None] & (column_R < last)[None]
    if constants.M == 1:
        part_P11 = tl.arange(0, constants.P)[:, None, None]
        place_PMR = part_P11 * (constants.ROWS * constants.selection) + place_MR[None]
        mask_PMR = (part_P11 < constants.PARTS) & mask_MR[None]
        loaded = tl.load(parts + place_PMR, mask=mask_PMR, other=0.0).to(tl.float32)
    else:
        loaded = tl.load(parts + place_MR, mask=mask_MR, other=0.0).to(tl.float32)
    return loaded


@triton.jit
@no_type_check
def finish_selection(loaded, dtype: tl.constexpr, constants: tl.constexpr):
    """(M, R), rounded as the layer's output is."""
    if constants.M == 1:
        loaded = tl.sum(loaded, axis=0)
    return loaded.to(dtype)
