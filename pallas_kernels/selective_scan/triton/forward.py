"""The forward kernel of the selective scan in Triton; import only where triton is installed.

`tiles.py` explains layout and suffixes; numbers of equations are those of README.md one folder up.
"""

# Triton compiles what only looks like Python, and need not be installed.
# pyrefly: ignore-errors
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.selective_scan.triton.equations import coefficients, scan, sigmoid
from pallas_kernels.selective_scan.triton.tiles import (
    Inputs,
    load_block,
    load_emit_tile,
    load_inject_tile,
    load_state,
    matrix_tile,
    store_sequence,
    sum_states,
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
    segment_ids,
    initial_state,
    y,
    final_state,
    checkpoints,
    constants: tl.constexpr,
):
    """Equations 1 to 6: writes y (B, L, E), final_state (B, E, N) and checkpoints (B, chunks, E, N).

    A checkpoint is the state before a chunk. Pointers of absent arguments are not read.
    """
    inputs = Inputs(x, dt, z, A, B, C, D, dt_bias, segment_ids)
    block = load_block(inputs, constants)
    state_REP, is_state_REP = block.state_REP, block.is_state_REP
    of_row = block.row * constants.CHANNELS * constants.STATES
    # The state, equation 4: it stays in registers from the first token to the last.
    h_REP = tl.zeros_like(block.A_REP)
    if constants.HAS_INITIAL:
        h_REP = load_state(initial_state + of_row + state_REP, is_state_REP)

    # Every load is issued a tile ahead of its use. Adding row * 0 makes the token's index 64 bits wide.
    first = block.row * 0
    emit_tile = load_emit_tile(inputs, block, first, constants)
    inject_tile = load_inject_tile(inputs, block, first, constants)
    for tile in tl.range(0, constants.tiles):
        first = block.row * 0 + tile * constants.T
        next_emit_tile = load_emit_tile(inputs, block, first + constants.T, constants)
        next_inject_tile = load_inject_tile(inputs, block, first + constants.T, constants)
        # The state before a chunk, from which the backward kernel starts.
        if constants.HAS_CHECKPOINTS and tile % constants.CHUNK == 0:
            place = (block.row * constants.chunks + tile // constants.CHUNK) * constants.CHANNELS * constants.STATES
            tl.store(checkpoints + place + state_REP, h_REP, mask=is_state_REP)
        terms = coefficients(inject_tile, block, first, constants)
        _before_TREP, after_TREP, h_REP = scan(terms.a_TREP, terms.u_TREP, h_REP, constants.T)
        y_TE = output(after_TREP, terms.x_TE, emit_tile, block, constants)
        store_sequence(y, y_TE, block, first, constants)
        inject_tile, emit_tile = next_inject_tile, next_emit_tile
    tl.store(final_state + of_row + state_REP, h_REP, mask=is_state_REP)


@triton.jit
@no_type_check
def output(h_TREP, x_TE, emit_tile, block, constants: tl.constexpr):
    """Equations 5 and 6 from the states after the tokens of a tile."""
    y_TE = sum_states(h_TREP * matrix_tile(emit_tile.C, constants.C_GROUPS)) + block.D_E[None] * x_TE
    if constants.HAS_Z:
        z_TE = emit_tile.z_TE.to(tl.float32)
        y_TE = y_TE * (z_TE * sigmoid(z_TE))
    return y_TE
