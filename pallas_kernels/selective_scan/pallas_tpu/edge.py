"""The edge kernels of the selective scan on TPUs: the final state of a sequence, and the gradient of its initial state.

Both start from zero and compute no outputs: h' of equation 21 in README.md, and its counterpart for the gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.tpu_tiles import LANES, SPAN, Refs, over, sequence, tile_lanes
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_tpu.forward import TOGETHER
from pallas_kernels.selective_scan.pallas_tpu.geometry import Geometry
from pallas_kernels.selective_scan.pallas_tpu.kernel import (
    column_of,
    enter_steps,
    gated,
    matrix_scratch,
    numbered,
    slice_rows,
    turn_matrices,
)


def scratch_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of float32 memory on the chip."""
    of_span = SPAN, geometry.tiling.tiles * LANES
    return matrix_scratch(geometry) | {"steps": of_span, "inputs": of_span}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Direction:
    """Which way a state goes through the tokens.

    Attributes:
        state: name of the memory that holds it.
        order: (i, count) -> index of the item that is visited i-th, of `count` items in the order of the sequence.
        weights: (refs, dt, span, lanes) -> the factor of B_t or C_t, for a span of tokens and a tile.
        advanced: (state, decay, what the token adds) -> the state after the token.
    """

    state: str
    order: Callable[[Any, int], Any]
    weights: Callable[..., jax.Array]
    advanced: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


# Equation 4: the state decays, then the token adds to it.
_FORWARD = _Direction(
    state="final_state",
    order=lambda i, count: i,
    weights=lambda refs, dt, span, lanes: dt * sequence(refs, "x", span, lanes),
    advanced=lambda state, decay, more: decay * state + more,
)
# Equations 10 and 11: the token adds dp_t C_t first, then the sum decays.
_BACKWARD = _Direction(
    state="dinitial_state",
    order=lambda i, count: count - 1 - i,
    weights=lambda refs, dt, span, lanes: gated(refs, sequence(refs, "dy", span, lanes), span, lanes),
    advanced=lambda state, decay, more: decay * (state + more),
)


def final_state(geometry: Geometry, features: Features, refs: Refs) -> None:
    """h_t = a_t h_{t-1} + dt_t x_t B_t for a block of channels and a chunk of tokens, into "final_state"."""
    _walk(_FORWARD, geometry, features, refs)


def initial_cotangent(geometry: Geometry, features: Features, refs: Refs) -> None:
    """g_{t-1} = a_t (g_t + dp_t C_t) for a block of channels and a chunk of tokens, into "dinitial_state"."""
    _walk(_BACKWARD, geometry, features, refs)


def _walk(direction: _Direction, geometry: Geometry, features: Features, refs: Refs) -> None:
    """Takes the state through a chunk, span by span, in the order of the direction."""
    # The index maps turn time around for the gradient, so step 0 is the chunk at which either direction starts.
    chunk, block = pl.program_id(2), pl.program_id(3)
    spans = geometry.tiling.tokens // SPAN
    # It stays in the output's block from chunk to chunk.
    state = refs[direction.state]

    @pl.when(chunk == 0)
    def _():
        state[block] = jnp.zeros_like(state[block])

    def advance(index, carry):
        _advance(direction, geometry, features, refs, direction.order(index, spans), block)
        return carry

    over(spans, advance)


def _advance(direction: _Direction, geometry: Geometry, features: Features, refs: Refs, span, block) -> None:
    """Takes all tiles of the block through a span of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiling.tiles)]
    resets = turn_matrices(geometry, refs, span)
    # Steps and weights go through memory, from which a load copies a row into all rows of a register.
    for lanes in tiles:
        dt = enter_steps(features, refs, span, lanes, block, resets)
        refs["inputs"][:, lanes] = direction.weights(refs, dt, span, lanes)

    def advance_slice(index, carry):
        for first in range(0, len(tiles), TOGETHER):
            _advance_tiles(direction, geometry, refs, block, index, numbered(tiles, first, TOGETHER))
        return carry

    over(geometry.slices, advance_slice)


def _advance_tiles(
    direction: _Direction, geometry: Geometry, refs: Refs, block, index, tiles: dict[int, slice]
) -> None:
    """Advances one slice of states through 16 tokens, for the given tiles."""
    state = refs[direction.state]
    rows = slice_rows(geometry, index)
    h = {i: state[block, rows, lanes] for i, lanes in tiles.items()}
    rates = {i: refs["A"][block, rows, lanes] for i, lanes in tiles.items()}
    for i_token in range(SPAN):
        t = direction.order(i_token, SPAN)
        # There is one matrix only, which has the places of both B and C.
        column = column_of(geometry, refs, "B", index, t)
        for i, lanes in tiles.items():
            # Equation 2, then 4 or 10 and 11.
            decay = jnp.exp2(refs["steps"][t : t + 1, lanes] * rates[i])
            more = refs["inputs"][t : t + 1, lanes] * column
            h[i] = direction.advanced(h[i], decay, more)
    for i, lanes in tiles.items():
        state[block, rows, lanes] = h[i]
