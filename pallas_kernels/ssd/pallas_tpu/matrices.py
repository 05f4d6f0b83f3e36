"""Matrices of a chunk in the TPU kernels: tokens along rows, the heads of a tile side by side along lanes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common.tpu_tiles import LANES
from pallas_kernels.ssd.pallas_tpu.geometry import CHUNK, Geometry

# Shapes and dtypes of memory on the chip, by name.
Scratch = dict[str, tuple[tuple[int, ...], jnp.dtype]]


def product(geometry: Geometry, a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """The product a b, or a b^T, in float32, of operands rounded to the geometry's dtype."""
    contracted = ((1,), (1 if transposed else 0,))
    precision = jax.lax.Precision.HIGHEST if geometry.exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a.astype(geometry.dtype),
        b.astype(geometry.dtype),
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def turned(matrix: jax.Array) -> jax.Array:
    """The transpose, in float32: registers of 32 bits are what is exchanged."""
    return matrix.astype(jnp.float32).T


def indices() -> tuple[jax.Array, jax.Array]:
    """Index of the row and of the column of every pair of tokens."""
    shape = CHUNK, CHUNK
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def head_lanes(geometry: Geometry, *, rows: int, first: int = 0) -> jax.Array:
    """(rows, LANES), 1 in the lanes of each head of a tile, whose rows begin at `first`, else 0."""
    head, lane = (jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), axis) for axis in (0, 1))
    start = (head - first) * geometry.width
    return jnp.where((lane >= start) & (lane < start + geometry.width), 1.0, 0.0)


def by_head(geometry: Geometry, parts: Sequence[jax.Array]) -> jax.Array:
    """Takes the lanes of each head of a tile from its part, (rows, LANES)."""
    result = parts[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, result.shape, 1)
    for head, part in enumerate(parts[1:], 1):
        result = jnp.where(lane < head * geometry.width, result, part)
    return result


def of_head(geometry: Geometry, head: int, tile: jax.Array) -> jax.Array:
    """The tile with zeros in the lanes of all other heads."""
    if geometry.tile_heads == 1:
        return tile
    lane = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    is_inside = (lane >= head * geometry.width) & (lane < (head + 1) * geometry.width)
    return jnp.where(is_inside, tile, jnp.zeros_like(tile))
