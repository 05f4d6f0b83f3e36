"""What the forward and the backward kernel on TPUs have in common.

Sequences have tokens along rows, as in memory; h has states along rows, so that B_t and C_t are columns, the same in
all lanes, and dt_t is a row, the same for all states.
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
    matrices = refs["matrices"][span_tokens(span), :].astype(jnp.float32)
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
    parts = [ref[tile, pl.ds(row, SPAN, stride=SUBLANES), :] for row in range(SUBLANES)]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def step_argument(refs: Refs, span, lanes: slice, block) -> jax.Array:
    """Dt of a span of tokens, before softplus."""
    dt = sequence(refs, "dt", span, lanes)
    return dt + refs["dt_bias"][block, :, lanes] if "dt_bias" in refs else dt


def step_size(features: Features, refs: Refs, span, lanes: slice, block) -> jax.Array:
    """Dt of a span of tokens."""
    dt = step_argument(refs, span, lanes, block)
    return softplus(dt, reciprocal) if features.softplus else dt


def enter_steps(features: Features, refs: Refs, span, lanes: slice, block, resets: jax.Array) -> jax.Array:
    """Leaves the steps of the decays of a span of tokens in "steps"; returns Dt."""
    dt = step_size(features, refs, span, lanes, block)
    # Rows are read back one at a time, each into all rows of a register.
    refs["steps"][:, lanes] = jnp.maximum(dt, resets)
    return dt


def gated(refs: Refs, values: jax.Array, span, lanes: slice) -> jax.Array:
    """Values of a span of tokens times silu(z), if there is a gate."""
    if "z" not in refs:
        return values
    z = sequence(refs, "z", span, lanes)
    return values * (z * sigmoid(z))
