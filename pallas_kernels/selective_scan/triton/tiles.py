"""Tiles of the selective scan in Triton: what a program works on, loads and stores, sums over states.

Import only where triton is installed.

A program owns one batch row and a block of channels, and walks over tiles of T tokens. Within a tile everything is an
array (T, R, E, P): the N states of a channel are spread over P lanes with R consecutive states each. Triton gives the
lanes of a warp to the last axes first, P and then E, and warps to what is left of E, so that T and R lie in the
registers of one thread: the scan over T and the sum over R need no communication.

Suffixes spell shapes: T tokens of a tile, E channels of a block, N = P R states, L length. Steps, states, and
everything computed from them are float32. Names beginning with d are gradients.

Values that belong together travel as named tuples, which Triton takes apart when it compiles: they cost nothing.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Inputs(NamedTuple):
    """Pointers to the arguments of the scan that both kernels read; those of absent arguments are not read."""

    x: tl.tensor
    dt: tl.tensor
    z: tl.tensor
    A: tl.tensor
    B: tl.tensor
    C: tl.tensor
    D: tl.tensor
    dt_bias: tl.tensor
    segment_ids: tl.tensor


class Block(NamedTuple):
    """A program's place and channels, and what of them does not depend on time.

    The place is a batch row (64 bits wide), a group, and the index of the block within the group. state_REP are offsets
    into an array (E, N); exists_E and is_state_REP tell channels and states from padding. A_REP is A log2(e), because
    the hardware computes powers of two.
    """

    row: tl.tensor
    group: tl.tensor
    index: tl.tensor
    channel_E: tl.tensor
    exists_E: tl.tensor
    state_REP: tl.tensor
    is_state_REP: tl.tensor
    A_REP: tl.tensor
    D_E: tl.tensor
    bias_E: tl.tensor


class InjectTile(NamedTuple):
    """A tile of what the coefficients of equation 4 are made of. starts_T: where a segment starts."""

    x_TE: tl.tensor
    dt_TE: tl.tensor
    B: tl.tensor
    starts_T: tl.tensor


class EmitTile(NamedTuple):
    """A tile of what equations 5 and 6 make the output of, besides states and x. Without a gate z_TE is not read."""

    z_TE: tl.tensor
    C: tl.tensor


@triton.jit
@no_type_check
def load_block(inputs, constants: tl.constexpr):
    """The `Block` of this program: programs count blocks of a group first, then groups, then batch rows."""
    program = tl.program_id(0)
    # A row's offset in an array may exceed 2^31 elements.
    row = (program // (constants.blocks * constants.GROUPS)).to(tl.int64)
    group = program // constants.blocks % constants.GROUPS
    index = program % constants.blocks
    # No block crosses a group: its channels share B and C.
    within_group_E = index * constants.E + tl.arange(0, constants.E)
    channel_E = group * constants.channels_per_group + within_group_E
    exists_E = within_group_E < constants.channels_per_group
    state_R1P = state_index(constants)
    state_REP = channel_E[None, :, None] * constants.STATES + state_R1P
    is_state_REP = exists_E[None, :, None] & (state_R1P < constants.STATES)
    A_REP = load_state(inputs.A + state_REP, is_state_REP) * LOG2_E
    D_E = load_channels(inputs.D, channel_E, exists_E, constants.HAS_D)
    bias_E = load_channels(inputs.dt_bias, channel_E, exists_E, constants.HAS_BIAS)
    return Block(row, group, index, channel_E, exists_E, state_REP, is_state_REP, A_REP, D_E, bias_E)


@triton.jit
@no_type_check
def state_index(constants: tl.constexpr):
    """(R, 1, P): a lane holds R consecutive states."""
    return tl.arange(0, constants.P)[None, None, :] * constants.R + tl.arange(0, constants.R)[:, None, None]


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
def sequence_tile(block, first, constants: tl.constexpr):
    """(T, E) offsets into an array (B, L, E), and which of them exist."""
    time_T = tl.arange(0, constants.T)
    offset_TE = time_T[:, None] * constants.CHANNELS + block.channel_E[None]
    offset_TE = (block.row * constants.LENGTH + first) * constants.CHANNELS + offset_TE
    return offset_TE, (first + time_T < constants.LENGTH)[:, None] & block.exists_E[None]


@triton.jit
@no_type_check
def load_sequence(pointer, block, first, constants: tl.constexpr):
    offset_TE, exists_TE = sequence_tile(block, first, constants)
    return tl.load(pointer + offset_TE, mask=exists_TE, other=0.0)


@triton.jit
@no_type_check
def store_sequence(pointer, values_TE, block, first, constants: tl.constexpr):
    offset_TE, exists_TE = sequence_tile(block, first, constants)
    tl.store(pointer + offset_TE, values_TE.to(pointer.dtype.element_ty), mask=exists_TE)


@triton.jit
@no_type_check
def matrix_offsets(block, first, GROUPS: tl.constexpr, constants: tl.constexpr):
    """(T, R, P) offsets from a group's states at token `first` in an array (L, GROUPS, N), and which of them exist."""
    state_1RP = tl.arange(0, constants.P)[None, None, :] * constants.R + tl.arange(0, constants.R)[None, :, None]
    time_T = tl.arange(0, constants.T)[:, None, None]
    exists_TRP = (first + time_T < constants.LENGTH) & (state_1RP < constants.STATES)
    return time_T * (GROUPS * constants.STATES) + state_1RP, exists_TRP


@triton.jit
@no_type_check
def load_matrix(pointer, block, first, GROUPS: tl.constexpr, constants: tl.constexpr):
    """(T, R, P) of B or C (B, L, GROUPS, N), whose only group serves all; (R, E, P) of (E, N) if GROUPS is 0."""
    if GROUPS == 0:
        return tl.load(pointer + block.state_REP, mask=block.is_state_REP, other=0.0)
    else:
        group = block.group
        # B and C may differ in their groups: a matrix with one group serves those of the other.
        if GROUPS == 1:
            group = 0
        # E is missing on purpose: the matrix is loaded once for all channels of a block.
        offset_TRP, exists_TRP = matrix_offsets(block, first, GROUPS, constants)
        offset = ((block.row * constants.LENGTH + first) * GROUPS + group) * constants.STATES
        return tl.load(pointer + offset + offset_TRP, mask=exists_TRP, other=0.0)


@triton.jit
@no_type_check
def store_matrix(pointer, values_TREP, block, first, constants: tl.constexpr):
    """Sums over the block's channels into the block's part (T, R, P) of an array (blocks, B, L, GROUPS, N)."""
    # Blocks write apart from each other, and the caller adds them up: atomic additions would have no fixed order.
    offset_TRP, exists_TRP = matrix_offsets(block, first, constants.GROUPS, constants)
    offset = (block.index * constants.BATCH + block.row) * constants.LENGTH + first
    offset = (offset * constants.GROUPS + block.group) * constants.STATES
    tl.store(pointer + offset + offset_TRP, tl.sum(values_TREP, axis=2), mask=exists_TRP)


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
def load_starts(segment_ids, block, first, constants: tl.constexpr):
    """(T,): the token's segment is not that of the token before; the first token of all starts none."""
    token_T = first + tl.arange(0, constants.T)
    # False for all, in the right shape.
    starts_T = token_T < 0
    if constants.HAS_SEGMENTS:
        has_past_T = (token_T > 0) & (token_T < constants.LENGTH)
        id_T = tl.load(segment_ids + block.row * constants.LENGTH + token_T, mask=has_past_T, other=0)
        id_before_T = tl.load(segment_ids + block.row * constants.LENGTH + token_T - 1, mask=has_past_T, other=0)
        starts_T = id_T != id_before_T
    return starts_T


@triton.jit
@no_type_check
def load_inject_tile(inputs, block, first, constants: tl.constexpr):
    x_TE = load_sequence(inputs.x, block, first, constants)
    dt_TE = load_sequence(inputs.dt, block, first, constants)
    B = load_matrix(inputs.B, block, first, constants.B_GROUPS, constants)
    return InjectTile(x_TE, dt_TE, B, load_starts(inputs.segment_ids, block, first, constants))


@triton.jit
@no_type_check
def load_emit_tile(inputs, block, first, constants: tl.constexpr):
    # A variable of a loop needs a value even if it is not read.
    z_TE = first
    if constants.HAS_Z:
        z_TE = load_sequence(inputs.z, block, first, constants)
    C = load_matrix(inputs.C, block, first, constants.C_GROUPS, constants)
    return EmitTile(z_TE, C)


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
