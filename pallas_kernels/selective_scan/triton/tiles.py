"""Tiles of the selective scan in Triton: loads and stores, pointwise arithmetic, the recurrence and its adjoint.

Import only where triton is installed; `kernels.py` explains layout and suffixes.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# What rounding LOG2_E to float32 loses, for `exponential`.
LOG2_E_LOW = tl.constexpr(1.9259629911266175e-08)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def block_of_program(CHANNELS: tl.constexpr, GROUPS: tl.constexpr, E: tl.constexpr):
    """Batch row (64 bits wide), group, block within the group, and the channels of this program."""
    per_group: tl.constexpr = CHANNELS // GROUPS
    blocks: tl.constexpr = (per_group + E - 1) // E
    program = tl.program_id(0)
    # A row's offset in an array may exceed 2^31 elements.
    row = (program // (blocks * GROUPS)).to(tl.int64)
    group = program // blocks % GROUPS
    block = program % blocks
    # No block crosses a group: its channels share B and C.
    within_group_E = block * E + tl.arange(0, E)
    return row, group, block, group * per_group + within_group_E, within_group_E < per_group


@triton.jit
@no_type_check
def state_index(R: tl.constexpr, P: tl.constexpr):
    """(R, 1, P): a lane holds R consecutive states."""
    return tl.arange(0, P)[None, None, :] * R + tl.arange(0, R)[:, None, None]


@triton.jit
@no_type_check
def state_tile(channel_E, exists_E, STATES: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """(R, E, P) offsets into an array (E, N), and which of them exist."""
    state_R1P = state_index(R, P)
    return channel_E[None, :, None] * STATES + state_R1P, exists_E[None, :, None] & (state_R1P < STATES)


@triton.jit
@no_type_check
def load_state(pointer_REP, is_state_REP):
    """(R, E, P), in the layout of tiles from the start: see `per_state` for the sum over an axis of size 1."""
    return tl.sum(tl.load(pointer_REP, mask=is_state_REP, other=0.0)[None], axis=0)


@triton.jit
@no_type_check
def load_channels(pointer, channel_E, exists_E, IS_PRESENT: tl.constexpr):
    """(E,), zeros if absent."""
    values_E = tl.zeros(channel_E.shape, tl.float32)
    if IS_PRESENT:
        values_E = tl.load(pointer + channel_E, mask=exists_E, other=0.0)
    return values_E


@triton.jit
@no_type_check
def sequence_tile(row, first, channel_E, exists_E, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, T: tl.constexpr):
    """(T, E) offsets into an array (B, L, E), and which of them exist."""
    time_T = tl.arange(0, T)
    offset_TE = (row * LENGTH + first) * CHANNELS + (time_T[:, None] * CHANNELS + channel_E[None])
    return offset_TE, (first + time_T < LENGTH)[:, None] & exists_E[None]


@triton.jit
@no_type_check
def load_sequence(
    pointer, row, first, channel_E, exists_E, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, T: tl.constexpr
):
    offset_TE, exists_TE = sequence_tile(row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    return tl.load(pointer + offset_TE, mask=exists_TE, other=0.0)


@triton.jit
@no_type_check
def store_sequence(
    pointer, values_TE, row, first, channel_E, exists_E, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, T: tl.constexpr
):
    offset_TE, exists_TE = sequence_tile(row, first, channel_E, exists_E, LENGTH, CHANNELS, T)
    tl.store(pointer + offset_TE, values_TE.to(pointer.dtype.element_ty), mask=exists_TE)


@triton.jit
@no_type_check
def load_matrix(
    pointer,
    row,
    first,
    group,
    state_REP,
    is_state_REP,
    LENGTH: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    """(T, R, P) of B or C (B, L, GROUPS, N), whose only group serves all; (R, E, P) of (E, N) if GROUPS is 0."""
    if GROUPS == 0:
        return tl.load(pointer + state_REP, mask=is_state_REP, other=0.0)
    else:
        # B and C may differ in their groups: a matrix with one group serves those of the other.
        if GROUPS == 1:
            group = 0
        # E is missing on purpose: the matrix is loaded once for all channels of a block.
        state_1RP = tl.arange(0, P)[None, None, :] * R + tl.arange(0, R)[None, :, None]
        time_T = tl.arange(0, T)[:, None, None]
        offset = ((row * LENGTH + first) * GROUPS + group) * STATES
        exists_TRP = (first + time_T < LENGTH) & (state_1RP < STATES)
        return tl.load(pointer + offset + (time_T * (GROUPS * STATES) + state_1RP), mask=exists_TRP, other=0.0)


@triton.jit
@no_type_check
def store_matrix(
    pointer,
    values_TREP,
    row,
    first,
    group,
    block,
    BATCH: tl.constexpr,
    LENGTH: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    """Sums over the block's channels into the block's part (T, R, P) of an array (blocks, B, L, GROUPS, N)."""
    # Blocks write apart from each other, and the caller adds them up: atomic additions would have no fixed order.
    state_1RP = tl.arange(0, P)[None, None, :] * R + tl.arange(0, R)[None, :, None]
    time_T = tl.arange(0, T)[:, None, None]
    offset = (((block * BATCH + row) * LENGTH + first) * GROUPS + group) * STATES
    exists_TRP = (first + time_T < LENGTH) & (state_1RP < STATES)
    tl.store(pointer + offset + (time_T * (GROUPS * STATES) + state_1RP), tl.sum(values_TREP, axis=2), mask=exists_TRP)


@triton.jit
@no_type_check
def matrix_tile(tile, GROUPS: tl.constexpr):
    """What `load_matrix` returned, in float32 and broadcastable to (T, R, E, P)."""
    if GROUPS == 0:
        return tile.to(tl.float32)[None]
    else:
        return tile.to(tl.float32)[:, :, None, :]


@triton.jit
@no_type_check
def load_starts(segment_ids, row, first, LENGTH: tl.constexpr, T: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """(T,): the token's segment is not that of the token before; the first token of all starts none."""
    token_T = first + tl.arange(0, T)
    # False for all, in the right shape.
    starts_T = token_T < 0
    if HAS_SEGMENTS:
        has_past_T = (token_T > 0) & (token_T < LENGTH)
        id_T = tl.load(segment_ids + row * LENGTH + token_T, mask=has_past_T, other=0)
        id_before_T = tl.load(segment_ids + row * LENGTH + token_T - 1, mask=has_past_T, other=0)
        starts_T = id_T != id_before_T
    return starts_T


@triton.jit
@no_type_check
def step_size(dt_TE, bias_E, valid_T, SOFTPLUS: tl.constexpr):
    """The step of equation 1 and its derivative, the sigmoid of equation 18; both zero where there is no token."""
    step_TE = dt_TE.to(tl.float32) + bias_E[None]
    slope_TE = tl.full(step_TE.shape, 1.0, tl.float32)
    if SOFTPLUS:
        # softplus(v) = max(v, 0) + log(1 + e) with e = exp(-|v|) in (0, 1]; log(1 + e) = 2 artanh(e / (2 + e)), whose
        # argument is at most 1/3: the series is exact in float32 and relatively so for tiny e.
        e_TE = exponential(-tl.abs(step_TE))
        slope_TE = tl.where(step_TE >= 0, 1.0, e_TE) / (1 + e_TE)
        ratio_TE = e_TE / (2 + e_TE)
        square_TE = ratio_TE * ratio_TE
        series_TE = tl.full(step_TE.shape, 1.0 / 15, tl.float32)
        for k in tl.static_range(7):
            series_TE = series_TE * square_TE + 1.0 / (13 - 2 * k)
        step_TE = tl.maximum(step_TE, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2 * ratio_TE * series_TE
    return tl.where(valid_T[:, None], step_TE, 0.0), tl.where(valid_T[:, None], slope_TE, 0.0)


@triton.jit
@no_type_check
def sigmoid(value):
    # exp(-|value|) cannot overflow.
    e = exponential(-tl.abs(value))
    return tl.where(value >= 0, 1.0, e) / (1 + e)


@triton.jit
@no_type_check
def exponential(value):
    """The exponential of a value that is not positive; the rounding of value log2(e) is made up for."""
    # For infinity the rest below would be inf - inf; exp(-120) is 0 in float32 already.
    value = tl.maximum(value, -120.0, propagate_nan=tl.PropagateNan.ALL)
    exponent = value * LOG2_E
    rest = tl.fma(value, LOG2_E, -exponent) + value * LOG2_E_LOW
    return tl.exp2(exponent) * (1 + rest * LN_2)


@triton.jit
@no_type_check
def decay(step_T1E1, A_REP, starts_T, HAS_SEGMENTS: tl.constexpr):
    """Equation 2: exp(step A), zero where a segment starts; A_REP is log2(e) A."""
    exponent_TREP = step_T1E1 * A_REP[None]
    if HAS_SEGMENTS:
        # The exponent, not the step, becomes infinite: steps stay finite for equation 13.
        exponent_TREP += tl.where(starts_T, float("-inf"), 0.0)[:, None, None, None]
    return tl.exp2(exponent_TREP)


@triton.jit
@no_type_check
def gain(step_T1E1, A_REP):
    """W of equation 20, step phi(v) with v = step A; a power series where exp(v) - 1 would cancel."""
    v = step_T1E1 * (A_REP * LN_2)[None]
    is_small = tl.abs(v) < 1
    # Both branches are computed; each gets a harmless argument where the other one counts.
    far = tl.where(is_small, 1.0, v)
    near = tl.where(is_small, v, 0.0)
    # phi(v) = sum of v^k / (k + 1)! up to k = 11: for |v| < 1 the rest is below 1 / 13!, 2e-10.
    series = tl.full(v.shape, 1.0, tl.float32)
    for k in tl.static_range(11):
        series = series * (near * (1.0 / (12 - k))) + 1.0
    return step_T1E1 * tl.where(is_small, series, (tl.exp(far) - 1) / far)


@triton.jit
@no_type_check
def gain_by_A(step_T1E1, A_REP):
    """The derivative of `gain` by A, step^2 phi'(v) with phi'(v) = (exp(v) - phi(v)) / v."""
    v = step_T1E1 * (A_REP * LN_2)[None]
    is_small = tl.abs(v) < 1
    far = tl.where(is_small, 1.0, v)
    near = tl.where(is_small, v, 0.0)
    series = tl.full(v.shape, 1.0, tl.float32)
    for k in tl.static_range(10):
        series = series * (near * ((11.0 - k) / ((10.0 - k) * (12.0 - k)))) + 1.0
    exp_far = tl.exp(far)
    return step_T1E1 * (step_T1E1 * tl.where(is_small, 0.5 * series, (exp_far - (exp_far - 1) / far) / far))


@triton.jit
@no_type_check
def sum_states(values_TREP):
    """(T, E): first over the R states of a lane, in its registers, then over the P lanes of a channel."""
    return tl.sum(tl.sum(values_TREP, axis=1), axis=2)


@triton.jit
@no_type_check
def per_state(values_TE):
    """(T, 1, E, 1) of the same values.

    The sum over an axis of size 1 is there for Triton, which would otherwise move the change of layout in front of the
    arithmetic behind the values, and have it done by every lane of a channel.
    """
    return tl.sum(values_TE[None], axis=0)[:, None, :, None]


@triton.jit
@no_type_check
def at(values_TREP, token_T, token: tl.constexpr):
    """(R, E, P): the values of one token.

    Triton cannot index registers, so the other tokens are masked to -0.0 and summed away: x + -0.0 is x for every x,
    so the compiler drops the additions. The bits are spelt out because Triton makes 0.0 of a literal -0.0.
    """
    nothing = tl.full((), -(2**31), tl.int32).to(tl.float32, bitcast=True)
    return tl.sum(tl.where((token_T == token)[:, None, None, None], values_TREP, nothing), axis=0)


@triton.jit
@no_type_check
def replaced(values_TREP, token_T, token: tl.constexpr, value_REP):
    """The array with one token's (R, E, P) replaced."""
    return tl.where((token_T == token)[:, None, None, None], value_REP[None], values_TREP)


@triton.jit
@no_type_check
def scan(a_TREP, u_TREP, h_REP, T: tl.constexpr):
    """Equation 4: the states before and after every token, and after the last, from the state before the first."""
    # T is an axis of registers, which Triton cannot index: masks that are known at compile time choose a token.
    token_T = tl.arange(0, T)
    before_TREP = tl.zeros_like(u_TREP)
    after_TREP = tl.zeros_like(u_TREP)
    for token in tl.static_range(T):
        before_TREP = replaced(before_TREP, token_T, token, h_REP)
        h_REP = at(a_TREP, token_T, token) * h_REP + at(u_TREP, token_T, token)
        after_TREP = replaced(after_TREP, token_T, token, h_REP)
    return before_TREP, after_TREP, h_REP


@triton.jit
@no_type_check
def adjoint_scan(a_TREP, dh_TREP, carry_REP, T: tl.constexpr):
    """Equations 10 and 11: dh_t and g_{t-1} of every token, and g before the first.

    dh_TREP is dp_t C_t, what a token's own output contributes; carry_REP is g after the last token.
    """
    token_T = tl.arange(0, T)
    after_TREP = tl.zeros_like(dh_TREP)
    before_TREP = tl.zeros_like(dh_TREP)
    for token in tl.static_range(T - 1, -1, -1):
        carry_REP += at(dh_TREP, token_T, token)
        after_TREP = replaced(after_TREP, token_T, token, carry_REP)
        carry_REP *= at(a_TREP, token_T, token)
        before_TREP = replaced(before_TREP, token_T, token, carry_REP)
    return after_TREP, before_TREP, carry_REP


@triton.jit
@no_type_check
def coefficients(
    x_TE, step_TE, A_REP, B_tile, starts_T, B_GROUPS: tl.constexpr, ZOH: tl.constexpr, HAS_SEGMENTS: tl.constexpr
):
    """Equations 2 and 3: a, u, and what u was made of, which its transpose needs: gain, step and inflow.

    The gain is that of equation 20 for "zoh"; for "euler" the step is part of the inflow, and the gain is not read.
    """
    step_T1E1 = per_state(step_TE)
    inflow_T1E1 = per_state(x_TE if ZOH else step_TE * x_TE)
    a_TREP = decay(step_T1E1, A_REP, starts_T, HAS_SEGMENTS)
    u_TREP = inflow_T1E1 * matrix_tile(B_tile, B_GROUPS)
    gain_TREP = a_TREP
    if ZOH:
        gain_TREP = gain(step_T1E1, A_REP)
        u_TREP *= gain_TREP
    return a_TREP, u_TREP, gain_TREP, step_T1E1, inflow_T1E1


@triton.jit
@no_type_check
def through_coefficients(
    dexponent_TREP, du_TREP, x_TE, step_TE, A_REP, B_TREP, gain_TREP, step_T1E1, inflow_T1E1, ZOH: tl.constexpr
):
    """The transpose of `coefficients`: x's gradient without the skip, the step's, A's by token, and B's by channel.

    `dexponent_TREP` is e of equation 12.
    """
    # Equations 13 and 14, and the sum of 17; ln 2 because A_REP is A log2(e).
    dA_TREP = dexponent_TREP * step_T1E1
    dB_TREP = du_TREP * inflow_T1E1
    dstep_TE = sum_states(dexponent_TREP * A_REP[None]) * LN_2
    if ZOH:
        # Equation 20 and the terms after it.
        dgain_TREP = du_TREP * B_TREP
        dx_TE = sum_states(dgain_TREP * gain_TREP)
        dstep_TE += x_TE * sum_states(dgain_TREP * tl.exp2(step_T1E1 * A_REP[None]))
        dA_TREP += dgain_TREP * inflow_T1E1 * gain_by_A(step_T1E1, A_REP)
        dB_TREP *= gain_TREP
    else:
        # Equation 15, then the terms of 16 and 17 that follow from it.
        dinflow_TE = sum_states(du_TREP * B_TREP)
        dx_TE = dinflow_TE * step_TE
        dstep_TE += dinflow_TE * x_TE
    return dx_TE, dstep_TE, dA_TREP, dB_TREP


@triton.jit
@no_type_check
def through_gate(dy_TE, out_TE, z_TE):
    """Equations 8 and 9: the gradients of the output before the gate, which is `out_TE`, and of z."""
    z_TE = z_TE.to(tl.float32)
    open_TE = sigmoid(z_TE)
    dz_TE = dy_TE * out_TE * (open_TE * (1 + z_TE * (1 - open_TE)))
    return dy_TE * (z_TE * open_TE), dz_TE
