"""What the forward and the backward kernel on TPUs have in common.

Sequences have tokens along rows, as in memory; h has states along rows, so that B_t and C_t are columns, the same in
all lanes, and dt_t is a row, the same for all states. Numbers of equations are those of README.md one folder up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.register_math import softplus
from pallas_kernels.common.tpu_tiles import LANES, SPAN, SUBLANES, Refs, reciprocal, sequence, sigmoid, span_tokens
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_tpu.geometry import RESET, Geometry


def matrix_scratch(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Memory for `turn_matrices`."""
    return {"columns": (2 * geometry.states, LANES)}


def turn_matrices(geometry: Geometry, refs: Refs, span) -> jax.Array:
    """Turns B_t and C_t of a span of tokens into columns; returns RESET in the rows where a segment starts."""
    # One transposition serves SPAN tokens; B, C and the marks travel together, as rows of B alone would fill 128 lanes
    # too.
    matrices = refs["matrices"][span_tokens(span), :].astype(jnp.float32)
    # Only SPAN of the 128 lanes are used: a token is a lane here, which `column_of` copies into all others.
    refs["columns"][:, :SPAN] = matrices[:, : 2 * geometry.states].T
    return jnp.broadcast_to(matrices[:, 2 * geometry.states :] * RESET, (SPAN, LANES))


def column_of(geometry: Geometry, refs: Refs, name: str, index, t: int) -> jax.Array:
    """A slice of B_t or C_t of a token of the span, copied into all lanes.

    The exchange between lanes is done by a unit that has nothing else to do.
    """
    rows = slice_rows(geometry, index, offset=geometry.states if name == "C" else 0)
    return jnp.broadcast_to(refs["columns"][rows, t : t + 1], (geometry.slice_states, LANES))


def numbered(tiles: list[slice], first: int, count: int) -> dict[int, slice]:
    """Some of a block's tiles by number."""
    return dict(list(enumerate(tiles))[first : first + count])


def slice_rows(geometry: Geometry, index, *, offset: int = 0) -> pl.Slice:
    """Rows of a slice of states, in memory where states begin at a row `offset`."""
    size = geometry.slice_states
    return pl.ds(pl.multiple_of(offset + index * size, SUBLANES), size)


def row_sums(ref: Any, tile: int) -> jax.Array:
    """Sums of 8 rows of a tile: row t of the result is the sum of rows 8 t to 8 t + 7.

    Reading every eighth row puts tokens along rows, so that the sum needs no exchange between rows.
    """
    # A tree of three levels instead of seven additions that wait for each other.
    parts = [ref[tile, pl.ds(row, SPAN, stride=SUBLANES), :] for row in range(SUBLANES)]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def step_argument(refs: Refs, span, lanes: slice, block) -> jax.Array:
    """The argument of equation 1, dt + b, for a span of tokens."""
    dt = sequence(refs, "dt", span, lanes)
    return dt + refs["dt_bias"][block, :, lanes] if "dt_bias" in refs else dt


def step_size(features: Features, refs: Refs, span, lanes: slice, block) -> jax.Array:
    """Equation 1 for a span of tokens."""
    dt = step_argument(refs, span, lanes, block)
    return softplus(dt, reciprocal) if features.softplus else dt


def enter_steps(features: Features, refs: Refs, span, lanes: slice, block, resets: jax.Array) -> jax.Array:
    """Leaves the steps for the decays of a span of tokens in "steps", huge at resets; returns those of equation 1."""
    dt = step_size(features, refs, span, lanes, block)
    # They go through memory because a load can copy one row into all rows of a register, at no cost.
    refs["steps"][:, lanes] = jnp.maximum(dt, resets)
    return dt


def gated(refs: Refs, values: jax.Array, span, lanes: slice) -> jax.Array:
    """Equation 6 or 8: values of a span of tokens times silu(z), if there is a gate."""
    if "z" not in refs:
        return values
    z = sequence(refs, "z", span, lanes)
    return values * (z * sigmoid(z))
