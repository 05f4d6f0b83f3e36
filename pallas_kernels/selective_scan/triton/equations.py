"""The equations of the selective scan on tiles in Triton: step, coefficients, recurrence, and their transposes.

Import only where triton is installed; `tiles.py` explains layout and suffixes. Numbers of equations are those of
README.md one folder up.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from pallas_kernels.selective_scan.triton.tiles import LOG2_E, matrix_tile, per_state, sum_states

# What rounding LOG2_E to float32 loses, for `exponential`.
LOG2_E_LOW = tl.constexpr(1.9259629911266175e-08)
LN_2 = tl.constexpr(0.6931471805599453)


class Coefficients(NamedTuple):
    """Of equation 4: a and u, and what they were made of, which their transpose needs.

    The step of equation 1 is there twice, by channel and spread over a channel's lanes; slope_TE is its derivative by
    dt. The gain is that of equation 20 for "zoh"; for "euler" the step is part of the inflow, and the gain is not read.
    """

    a_TREP: tl.tensor
    u_TREP: tl.tensor
    x_TE: tl.tensor
    step_TE: tl.tensor
    slope_TE: tl.tensor
    step_T1E1: tl.tensor
    inflow_T1E1: tl.tensor
    gain_TREP: tl.tensor


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
def coefficients(tile, block, first, constants: tl.constexpr):
    """Equations 1 to 3 for the `InjectTile` of the tile whose first token is `first`."""
    # Past the end steps are zero: a is 1 and u is 0 there, so the state stays as it is.
    valid_T = first + tl.arange(0, constants.T) < constants.LENGTH
    x_TE = tile.x_TE.to(tl.float32)
    step_TE, slope_TE = step_size(tile.dt_TE, block.bias_E, valid_T, constants.SOFTPLUS)
    step_T1E1 = per_state(step_TE)
    inflow_T1E1 = per_state(x_TE if constants.ZOH else step_TE * x_TE)
    a_TREP = decay(step_T1E1, block.A_REP, tile.starts_T, constants.HAS_SEGMENTS)
    u_TREP = inflow_T1E1 * matrix_tile(tile.B, constants.B_GROUPS)
    gain_TREP = a_TREP
    if constants.ZOH:
        gain_TREP = gain(step_T1E1, block.A_REP)
        u_TREP *= gain_TREP
    return Coefficients(a_TREP, u_TREP, x_TE, step_TE, slope_TE, step_T1E1, inflow_T1E1, gain_TREP)


@triton.jit
@no_type_check
def through_coefficients(dexponent_TREP, du_TREP, terms, A_REP, B_TREP, ZOH: tl.constexpr):
    """The transpose of `coefficients`: x's gradient without the skip, the step's, A's by token, and B's by channel.

    `dexponent_TREP` is e of equation 12, `terms` the `Coefficients`.
    """
    # Equations 13 and 14, and the sum of 17; ln 2 because A_REP is A log2(e).
    dA_TREP = dexponent_TREP * terms.step_T1E1
    dB_TREP = du_TREP * terms.inflow_T1E1
    dstep_TE = sum_states(dexponent_TREP * A_REP[None]) * LN_2
    if ZOH:
        # Equation 20 and the terms after it.
        dgain_TREP = du_TREP * B_TREP
        dx_TE = sum_states(dgain_TREP * terms.gain_TREP)
        dstep_TE += terms.x_TE * sum_states(dgain_TREP * tl.exp2(terms.step_T1E1 * A_REP[None]))
        dA_TREP += dgain_TREP * terms.inflow_T1E1 * gain_by_A(terms.step_T1E1, A_REP)
        dB_TREP *= terms.gain_TREP
    else:
        # Equation 15, then the terms of 16 and 17 that follow from it.
        dinflow_TE = sum_states(du_TREP * B_TREP)
        dx_TE = dinflow_TE * terms.step_TE
        dstep_TE += dinflow_TE * terms.x_TE
    return dx_TE, dstep_TE, dA_TREP, dB_TREP


@triton.jit
@no_type_check
def through_gate(dy_TE, out_TE, z_TE):
    """Equations 8 and 9: the gradients of the output before the gate, which is `out_TE`, and of z."""
    z_TE = z_TE.to(tl.float32)
    open_TE = sigmoid(z_TE)
    dz_TE = dy_TE * out_TE * (open_TE * (1 + z_TE * (1 - open_TE)))
    return dy_TE * (z_TE * open_TE), dz_TE
