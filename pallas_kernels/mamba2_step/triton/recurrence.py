"""The kernels of the Mamba-2 step that advance the recurrence; import only where triton is installed.

A program owns one row and a block of the channels of a head, with all their states. Suffixes spell shapes: P channels
of the block, N states, J places of the ring.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.selective_scan.triton.equations import sigmoid, step_size
from pallas_kernels.selective_scan.triton.tiles import LOG2_E


@triton.jit
@no_type_check
def advance(
    x,
    BC,
    dt,
    z,
    scale,
    dt_bias,
    A_log,
    D,
    state,
    y,
    squares,
    new_state,
    constants: tl.constexpr,
):
    """Step, gate and squares: y (ROWS, E), and the state (ROWS, H, P, N) in place of the old one.

    squares (ROWS, H pieces) are sums of squares of what the gate gated, before y is multiplied with the scale.
    """
    row, head, piece, inner_P, exists_P, state_N, is_state_N = own_part(constants)
    place_PN = (row * constants.E + inner_P[:, None]) * constants.N + state_N[None]
    mask_PN = exists_P[:, None] & is_state_N[None]
    state_PN = tl.load(state + place_PN, mask=mask_PN, other=0.0).to(tl.float32)
    # What does not depend on the state is loaded while it comes.
    x_P = tl.load(x + row * constants.E + inner_P, mask=exists_P, other=0.0).to(tl.float32)
    z_P = tl.load(z + row * constants.E + inner_P, mask=exists_P, other=0.0).to(tl.float32)
    B_N, C_N = load_matrices(BC, row, head // (constants.H // constants.G), state_N, is_state_N, constants)
    D_P = load_skip(D, head, inner_P, exists_P, constants)
    scale_P = tl.load(scale + inner_P, mask=exists_P, other=0.0).to(tl.float32)
    one = tl.arange(0, 1)
    dt_11 = tl.load(dt + row * constants.H + head + one)[None]
    step_11 = step_of(dt_11, dt_bias, head, one < 1, constants)
    decay_11 = tl.exp2(-step_11 * decay_rate(A_log, head))

    state_PN = decay_11 * state_PN + step_11 * x_P[:, None] * B_N[None]
    y_P = tl.sum(state_PN * C_N[None], axis=1) + D_P * x_P
    tl.store(new_state + place_PN, state_PN.to(new_state.dtype.element_ty), mask=mask_PN)
    finish(y_P, z_P, scale_P, y, squares, row, head, piece, inner_P, exists_P, x.dtype.element_ty, constants)


@triton.jit
@no_type_check
def score_ring(ring_B, ring_length, BC, scores, new_ring_B, constants: tl.constexpr):
    """B_j C for the tokens j of a ring and the new one, zeros behind it: scores (ROWS, G, LENGTH) in float32.

    The new B takes its place in the ring. A program owns a row and a group.
    """
    program = tl.program_id(0)
    row, group = program // constants.G, program % constants.G
    place_J = tl.arange(0, constants.J)
    state_N = tl.arange(0, constants.STATES)
    is_state_N = state_N < constants.N
    B_N, C_N = load_matrices(BC, row, group, state_N, is_state_N, constants)
    now = tl.load(ring_length + row)
    place_JN = ((row * constants.LENGTH + place_J[:, None]) * constants.G + group) * constants.N + state_N[None]
    is_past_J1, is_now_J1 = (place_J < now)[:, None], (place_J == now)[:, None]
    B_JN = tl.load(ring_B + place_JN, mask=is_past_J1 & is_state_N[None], other=0.0).to(tl.float32)
    B_JN = tl.where(is_now_J1, B_N[None], B_JN)
    place_scores_J = program * constants.LENGTH + place_J
    tl.store(scores + place_scores_J, tl.sum(B_JN * C_N[None], axis=1), mask=place_J < constants.LENGTH)
    tl.store(new_ring_B + place_JN, B_JN.to(new_ring_B.dtype.element_ty), mask=is_now_J1 & is_state_N[None])


@triton.jit
@no_type_check
def advance_ring(
    scale,
    dt_bias,
    A_log,
    D,
    ring_x,
    ring_B,
    ring_dt,
    ring_length,
    scores,
    state,
    x,
    BC,
    dt,
    z,
    y,
    squares,
    new_state,
    new_ring_x,
    new_ring_dt,
    constants: tl.constexpr,
):
    """`advance` with a ring of LENGTH inputs, which the state takes in when it is full; see `score_ring`.

    The state is written only by rows whose ring is full. What is read from a row's length on counts as zeros: one of
    these places is being written. It is read all the same, as a load that waited for the length would come late.
    """
    row, head, piece, inner_P, exists_P, state_N, is_state_N = own_part(constants)
    place_J = tl.arange(0, constants.J)
    now = tl.load(ring_length + row)
    place_PN = (row * constants.E + inner_P[:, None]) * constants.N + state_N[None]
    mask_PN = exists_P[:, None] & is_state_N[None]
    state_PN = tl.load(state + place_PN, mask=mask_PN, other=0.0).to(tl.float32)
    group = head // (constants.H // constants.G)
    place_C_N = row * constants.BC + (constants.G + group) * constants.N + state_N
    C_N = tl.load(BC + place_C_N, mask=is_state_N, other=0.0).to(tl.float32)
    x_P = tl.load(x + row * constants.E + inner_P, mask=exists_P, other=0.0)
    z_P = tl.load(z + row * constants.E + inner_P, mask=exists_P, other=0.0).to(tl.float32)
    D_P = load_skip(D, head, inner_P, exists_P, constants)
    scale_P = tl.load(scale + inner_P, mask=exists_P, other=0.0).to(tl.float32)
    new_dt = tl.load(dt + row * constants.H + head)

    # The ring with this token at its place, and zeros behind it.
    slot_J = row * constants.LENGTH + place_J
    is_slot_J = place_J < constants.LENGTH
    places_JP = slot_J[:, None] * constants.E + inner_P[None]
    x_JP = tl.load(ring_x + places_JP, mask=is_slot_J[:, None] & exists_P[None], other=0.0).to(tl.float32)
    dt_J = tl.load(ring_dt + slot_J * constants.H + head, mask=is_slot_J, other=0.0).to(tl.float32)
    score_J = tl.load(scores + (row * constants.G + group) * constants.LENGTH + place_J, mask=is_slot_J, other=0.0)
    is_past_J, is_now_J = place_J < now, place_J == now
    x_JP = tl.where(is_now_J[:, None], x_P.to(tl.float32)[None], tl.where(is_past_J[:, None], x_JP, 0.0))
    dt_J = tl.where(is_now_J, new_dt.to(tl.float32), tl.where(is_past_J, dt_J, 0.0))
    step_J1 = step_of(dt_J[:, None], dt_bias, head, place_J <= now, constants)
    rate = decay_rate(A_log, head)
    # Of few terms a sum for each is as good as a scan, which Triton does not compile for so few.
    later_JJ = tl.where(place_J[None] > place_J[:, None], tl.sum(step_J1, axis=1)[None], 0.0)
    left_J1 = tl.exp2(-tl.sum(later_JJ, axis=1)[:, None] * rate) * step_J1
    decay = tl.exp2(-tl.sum(step_J1) * rate)

    y_P = decay * tl.sum(state_PN * C_N[None], axis=1)
    y_P += tl.sum(score_J[:, None] * left_J1 * x_JP, axis=0) + D_P * x_P.to(tl.float32)
    if now == constants.LENGTH - 1:
        # One token after the other, read once more: a product of whole tiles would want too many registers.
        state_PN = decay * state_PN
        for index in tl.range(0, constants.LENGTH):
            slot = row * constants.LENGTH + index
            past_P = tl.load(ring_x + slot * constants.E + inner_P, mask=exists_P, other=0.0)
            past_P = tl.where(index == now, x_P, past_P).to(tl.float32)
            left = tl.sum(tl.where((place_J == index)[:, None], left_J1, 0.0))
            past_N = tl.load(ring_B + (slot * constants.G + group) * constants.N + state_N, mask=is_state_N, other=0.0)
            state_PN += (left * past_P)[:, None] * past_N.to(tl.float32)[None]
        tl.store(new_state + place_PN, state_PN.to(new_state.dtype.element_ty), mask=mask_PN)
    slot = row * constants.LENGTH + now
    tl.store(new_ring_x + slot * constants.E + inner_P, x_P.to(new_ring_x.dtype.element_ty), mask=exists_P)
    if piece == 0:
        tl.store(new_ring_dt + slot * constants.H + head, new_dt.to(new_ring_dt.dtype.element_ty))
    finish(y_P, z_P, scale_P, y, squares, row, head, piece, inner_P, exists_P, x.dtype.element_ty, constants)


@triton.jit
@no_type_check
def own_part(constants: tl.constexpr):
    """Row, head and part of the head of this program; its channels among all, its states, and which of them exist."""
    program = tl.program_id(0)
    piece = program % constants.pieces
    head = program // constants.pieces % constants.H
    row = (program // (constants.pieces * constants.H)).to(tl.int64)
    channel_P = piece * constants.CHANNELS + tl.arange(0, constants.CHANNELS)
    state_N = tl.arange(0, constants.STATES)
    inner_P = head * constants.P + channel_P
    return row, head, piece, inner_P, channel_P < constants.P, state_N, state_N < constants.N


@triton.jit
@no_type_check
def load_matrices(BC, row, group, state_N, is_state_N, constants: tl.constexpr):
    """B and C (N,) of a group of heads."""
    place_N = row * constants.BC + group * constants.N + state_N
    B_N = tl.load(BC + place_N, mask=is_state_N, other=0.0).to(tl.float32)
    C_N = tl.load(BC + place_N + constants.G * constants.N, mask=is_state_N, other=0.0).to(tl.float32)
    return B_N, C_N


@triton.jit
@no_type_check
def load_skip(D, head, inner_P, exists_P, constants: tl.constexpr):
    """D of a head, or (P,) of its channels."""
    if constants.SKIPS == 1:
        D_P = tl.load(D + head).to(tl.float32)
    else:
        D_P = tl.load(D + inner_P, mask=exists_P, other=0.0).to(tl.float32)
    return D_P


@triton.jit
@no_type_check
def step_of(dt_J1, dt_bias, head, exists_J, constants: tl.constexpr):
    """The step sizes (J, 1) of a head within their limits, 0 where there is no token."""
    bias_1 = tl.load(dt_bias + head + tl.arange(0, 1)).to(tl.float32)
    step_J1, _slope_J1 = step_size(dt_J1, bias_1, exists_J, True)
    step_J1 = tl.maximum(step_J1, constants.DT_LEAST)
    if constants.DT_GREATEST < 3e38:
        step_J1 = tl.minimum(step_J1, constants.DT_GREATEST)
    return tl.where(exists_J[:, None], step_J1, 0.0)


@triton.jit
@no_type_check
def decay_rate(A_log, head):
    """-A of a head, in powers of two."""
    return tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2_E) * LOG2_E


@triton.jit
@no_type_check
def finish(
    y_P, z_P, scale_P, y, squares, row, head, piece, inner_P, exists_P, dtype: tl.constexpr, constants: tl.constexpr
):
    """Rounds the output of the recurrence as the layer's is, gates it, stores the sum of its squares, and it scaled."""
    gated_P = y_P.to(dtype).to(tl.float32) * z_P * sigmoid(z_P)
    gated_P = tl.where(exists_P, gated_P, 0.0)
    tl.store(squares + (row * constants.H + head) * constants.pieces + piece, tl.sum(gated_P * gated_P))
    tl.store(y + row * constants.E + inner_P, (gated_P * scale_P).to(y.dtype.element_ty), mask=exists_P)
