"""The backward kernel of the selective scan in Triton; import only where triton is installed.

`tiles.py` explains layout and suffixes; numbers of equations are those of README.md one folder up.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from pallas_kernels.selective_scan.triton.equations import (
    adjoint_scan,
    coefficients,
    scan,
    through_coefficients,
    through_gate,
)
from pallas_kernels.selective_scan.triton.tiles import (
    EmitTile,
    InjectTile,
    Inputs,
    load_block,
    load_emit_tile,
    load_inject_tile,
    load_sequence,
    load_state,
    matrix_tile,
    per_state,
    state_index,
    store_matrix,
    store_sequence,
    sum_states,
)


class Gradients(NamedTuple):
    """Pointers to the gradients that the kernel writes."""

    dx: tl.tensor
    ddt: tl.tensor
    dz: tl.tensor
    dA: tl.tensor
    dB: tl.tensor
    dC: tl.tensor
    dD: tl.tensor
    ddt_bias: tl.tensor
    dinitial_state: tl.tensor


class BackwardTile(NamedTuple):
    """What the kernel reads of a tile of tokens."""

    inject: InjectTile
    emit: EmitTile
    dy_TE: tl.tensor


class Carry(NamedTuple):
    """What one tile hands to the tile before it: g of equation 10, and the sums over the tokens from the tile on.

    dB_REP and dC_REP are for constant matrices. The sums for D and the bias keep the tokens of a tile apart, and are
    added at the very end.
    """

    g_REP: tl.tensor
    dA_REP: tl.tensor
    dB_REP: tl.tensor
    dC_REP: tl.tensor
    dD_TE: tl.tensor
    ddt_bias_TE: tl.tensor


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
    constants: tl.constexpr,
):
    """Equations 8 to 20: writes the gradients, chunk by chunk from the end.

    A chunk's states at the starts of its tiles are recomputed from its checkpoint into scratch (programs, CHUNK, E, N);
    the tiles then follow in reverse. dx, ddt, dz are (B, L, E); dA, dinitial_state, and dB and dC of constant matrices,
    (B, E, N), dD and ddt_bias (B, E), to be summed over rows. dB and dC of other matrices are (F / E, B, L, G, N), the
    part of every block of a group's F channels.
    """
    inputs = Inputs(x, dt, z, A, B, C, D, dt_bias, segment_ids)
    gradients = Gradients(dx, ddt, dz, dA, dB, dC, dD, ddt_bias, dinitial_state)
    block = load_block(inputs, constants)
    # Where a lane keeps a state in scratch: laid out for this program alone, so every lane reads what it wrote itself.
    kept_REP = tl.arange(0, constants.E)[None, :, None] * (constants.R * constants.P) + state_index(constants)
    kept_REP += tl.program_id(0).to(tl.int64) * (constants.CHUNK * constants.kept_states)
    carry = first_carry(dfinal_state, block, constants)

    first = block.row * 0 + (constants.chunks * constants.CHUNK - 1) * constants.T
    tile = load_tile(inputs, dy, block, first, constants)
    for chunk_from_end in tl.range(0, constants.chunks):
        chunk = constants.chunks - 1 - chunk_from_end
        place = (block.row * constants.chunks + chunk) * constants.CHANNELS * constants.STATES
        h_REP = load_state(checkpoints + place + block.state_REP, block.is_state_REP)
        recompute_states(scratch + kept_REP, h_REP, inputs, block, chunk * constants.CHUNK, constants)
        # Scratch is global memory: its stores must be visible before the loads below, which Triton does not see to.
        tl.debug_barrier()
        for index_from_end in tl.range(0, constants.CHUNK):
            index = constants.CHUNK - 1 - index_from_end
            first = block.row * 0 + (chunk * constants.CHUNK + index) * constants.T
            h_REP = load_state(scratch + kept_REP + index * constants.kept_states, block.is_state_REP)
            # Every load is issued a tile ahead of its use.
            next_tile = load_tile(inputs, dy, block, tl.maximum(first - constants.T, 0), constants)
            carry = backward_through_tile(tile, h_REP, carry, gradients, block, first, constants)
            tile = next_tile
        # The next chunk overwrites scratch.
        tl.debug_barrier()
    store_carry(gradients, carry, block, constants)


@triton.jit
@no_type_check
def first_carry(dfinal_state, block, constants: tl.constexpr):
    """At the end of the sequence g of equation 10 is the gradient of the final state, and the sums are empty."""
    of_row = block.row * constants.CHANNELS * constants.STATES
    g_REP = load_state(dfinal_state + of_row + block.state_REP, block.is_state_REP)
    nothing_REP = tl.zeros_like(g_REP)
    nothing_TE = tl.full((constants.T, constants.E), 0.0, tl.float32)
    return Carry(g_REP, nothing_REP, nothing_REP, nothing_REP, nothing_TE, nothing_TE)


@triton.jit
@no_type_check
def load_tile(inputs, dy, block, first, constants: tl.constexpr):
    dy_TE = load_sequence(dy, block, first, constants)
    emit_tile = load_emit_tile(inputs, block, first, constants)
    return BackwardTile(load_inject_tile(inputs, block, first, constants), emit_tile, dy_TE)


@triton.jit
@no_type_check
def recompute_states(kept_REP, h_REP, inputs, block, first_tile, constants: tl.constexpr):
    """Equation 4 again for a chunk, from its checkpoint: keeps the state before each of its tiles.

    `kept_REP` are pointers to where the state before the first tile goes; the others follow.
    """
    tl.store(kept_REP, h_REP)
    first = block.row * 0 + first_tile * constants.T
    # Here too every load is issued a tile ahead of its use.
    inject_tile = load_inject_tile(inputs, block, first, constants)
    for index in tl.range(1, constants.CHUNK):
        first = block.row * 0 + (first_tile + index - 1) * constants.T
        next_inject_tile = load_inject_tile(inputs, block, first + constants.T, constants)
        terms = coefficients(inject_tile, block, first, constants)
        _before_TREP, _after_TREP, h_REP = scan(terms.a_TREP, terms.u_TREP, h_REP, constants.T)
        tl.store(kept_REP + index * constants.kept_states, h_REP)
        inject_tile = next_inject_tile


@triton.jit
@no_type_check
def backward_through_tile(tile, h_REP, carry, gradients, block, first, constants: tl.constexpr):
    """Equations 8 to 20 for a tile, from the state before it and the `Carry` of the tile after it.

    Stores the gradients that have a time axis, and returns the `Carry` for the tile before it.
    """
    # Equation 4: the states of all tokens of the tile.
    terms = coefficients(tile.inject, block, first, constants)
    before_TREP, after_TREP, _last_REP = scan(terms.a_TREP, terms.u_TREP, h_REP, constants.T)

    # Equations 8 and 9, which need p of equation 5.
    C_TREP = matrix_tile(tile.emit.C, constants.C_GROUPS)
    dp_TE = tile.dy_TE.to(tl.float32)
    if constants.HAS_Z:
        p_TE = sum_states(after_TREP * C_TREP) + block.D_E[None] * terms.x_TE
        dp_TE, dz_TE = through_gate(dp_TE, p_TE, tile.emit.z_TE)
        store_sequence(gradients.dz, dz_TE, block, first, constants)
    # Equation 19.
    dD_TE = carry.dD_TE + dp_TE * terms.x_TE

    # Equations 10 and 11: du is dh_t, the gradient of u_t and of the state after a token, flow is g_{t-1}.
    dp_T1E1 = per_state(dp_TE)
    du_TREP, flow_TREP, g_REP = adjoint_scan(terms.a_TREP, dp_T1E1 * C_TREP, carry.g_REP, constants.T)
    # Equation 12, then 13 to 17 and 20 without sums over time or channels.
    B_TREP = matrix_tile(tile.inject.B, constants.B_GROUPS)
    dx_TE, dstep_TE, dA_TREP, dB_TREP = through_coefficients(
        flow_TREP * before_TREP, du_TREP, terms, block.A_REP, B_TREP, constants.ZOH
    )
    # Equation 14 for C; the sum over channels is that of `matrix_gradient`.
    dC_TREP = dp_T1E1 * after_TREP
    # Equation 16's skip, then 18.
    dx_TE += block.D_E[None] * dp_TE
    ddt_TE = dstep_TE * terms.slope_TE
    ddt_bias_TE = carry.ddt_bias_TE + ddt_TE
    dA_REP = carry.dA_REP + tl.sum(dA_TREP, axis=0)
    store_sequence(gradients.dx, dx_TE, block, first, constants)
    store_sequence(gradients.ddt, ddt_TE, block, first, constants)
    dB_REP = matrix_gradient(gradients.dB, dB_TREP, carry.dB_REP, block, first, constants.B_GROUPS, constants)
    dC_REP = matrix_gradient(gradients.dC, dC_TREP, carry.dC_REP, block, first, constants.C_GROUPS, constants)
    return Carry(g_REP, dA_REP, dB_REP, dC_REP, dD_TE, ddt_bias_TE)


@triton.jit
@no_type_check
def matrix_gradient(pointer, gradient_TREP, sum_REP, block, first, GROUPS: tl.constexpr, constants: tl.constexpr):
    """Equation 14's last step: a constant matrix' gradient is added to the sum over time, another's is stored.

    Stored gradients are summed over the channels of the block, in a fixed order.
    """
    if GROUPS == 0:
        sum_REP += tl.sum(gradient_TREP, axis=0)
    else:
        store_matrix(pointer, gradient_TREP, block, first, constants)
    return sum_REP


@triton.jit
@no_type_check
def store_carry(gradients, carry, block, constants: tl.constexpr):
    """g_0 of equation 11, and the sums over time: one row for each batch row, which the caller adds up."""
    of_row = block.row * constants.CHANNELS * constants.STATES
    state_REP, is_state_REP = block.state_REP, block.is_state_REP
    tl.store(gradients.dinitial_state + of_row + state_REP, carry.g_REP, mask=is_state_REP)
    tl.store(gradients.dA + of_row + state_REP, carry.dA_REP, mask=is_state_REP)
    if constants.B_GROUPS == 0:
        tl.store(gradients.dB + of_row + state_REP, carry.dB_REP, mask=is_state_REP)
    if constants.C_GROUPS == 0:
        tl.store(gradients.dC + of_row + state_REP, carry.dC_REP, mask=is_state_REP)
    of_row = block.row * constants.CHANNELS
    if constants.HAS_D:
        tl.store(gradients.dD + of_row + block.channel_E, tl.sum(carry.dD_TE, axis=0), mask=block.exists_E)
    if constants.HAS_BIAS:
        tl.store(gradients.ddt_bias + of_row + block.channel_E, tl.sum(carry.ddt_bias_TE, axis=0), mask=block.exists_E)
