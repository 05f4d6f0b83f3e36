"""The kernel for TPUs that takes a state, or its gradient, through all tokens and leaves only what comes out."""

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
        order: of `count` things that follow each other in the sequence, the index of the i-th that is met.
        weights: what multiplies the matrix, for a span of tokens and a tile: (refs, dt, span, lanes).
        advanced: the state after a token: (state, decay, what the token brings).
    """

    state: str
    order: Callable[[Any, int], Any]
    weights: Callable[..., jax.Array]
    advanced: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


_FORWARD = _Direction(
    state="final_state",
    order=lambda i, count: i,
    weights=lambda refs, dt, span, lanes: dt * sequence(refs, "x", span, lanes),
    advanced=lambda state, decay, more: decay * state + more,
)
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
    """dh_{t-1} = a_t (dh_t + dy_t C_t), with dy before the gate, from the last chunk on, into "dinitial_state"."""
    _walk(_BACKWARD, geometry, features, refs)


def _walk(direction: _Direction, geometry: Geometry, features: Features, refs: Refs) -> None:
    chunk, block = pl.program_id(2), pl.program_id(3)
    spans = geometry.tiling.tokens // SPAN
    # It stays in the output from chunk to chunk.
    state = refs[direction.state]

    @pl.when(chunk == 0)
    def _():
        state[block] = jnp.zeros_like(state[block])

    def advance(index, carry):
        _advance(direction, geometry, features, refs, direction.order(index, spans), block)
        return carry

    over(spans, advance)


def _advance(direction: _Direction, geometry: Geometry, features: Features, refs: Refs, span, block) -> None:
    """A span of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiling.tiles)]
    resets = turn_matrices(geometry, refs, span)
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
            decay = jnp.exp2(refs["steps"][t : t + 1, lanes] * rates[i])
            more = refs["inputs"][t : t + 1, lanes] * column
            h[i] = direction.advanced(h[i], decay, more)
    for i, lanes in tiles.items():
        state[block, rows, lanes] = h[i]
