"""The arguments of linear attention with decay in the shape of the TPU kernels, and their results in that of the op.

Sizes are padded with zeros to whole blocks: tokens at the end, heads at the end of every group, channels and states at
the end of every head.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.segments import padded as padded_sequence
from pallas_kernels.ssd.pallas_tpu.geometry import CHUNK, DVECTORS, Geometry


def padded(array: jax.Array) -> jax.Array:
    """(B, L, ...) with whole chunks."""
    return padded_sequence(array, CHUNK)


def unchunked(vector_BCHT: jax.Array, length: int) -> jax.Array:
    """(B, L, H) of a length without padding."""
    batch, _, heads, _ = vector_BCHT.shape
    return jnp.swapaxes(vector_BCHT, 2, 3).reshape(batch, -1, heads)[:, :length]


def channels(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(..., H, P) to (..., lanes of all strips)."""
    *leading, heads, _ = array.shape
    array = _filled(array, -1, geometry.pieces * geometry.width)
    array = array.reshape(*leading, geometry.groups, heads // geometry.groups * geometry.pieces, geometry.width)
    return _filled(array, -2, geometry.group_heads).reshape(*leading, -1)


def public_channels(geometry: Geometry, array: jax.Array, *, heads: int, width: int) -> jax.Array:
    """The inverse of `channels`."""
    leading = array.shape[:-1]
    array = array.reshape(*leading, geometry.groups, geometry.group_heads, geometry.width)
    array = array[..., : heads // geometry.groups * geometry.pieces, :]
    return array.reshape(*leading, heads, -1)[..., :width]


def values(geometry: Geometry, array_BLHP: jax.Array) -> jax.Array:
    """Values, or cotangents of outputs, (B, L, lanes of all strips)."""
    return channels(geometry, padded(array_BLHP))


def public_values(geometry: Geometry, array: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `values`, for an array like `like`."""
    _, length, heads, width = like.shape
    return public_channels(geometry, array[:, :length], heads=heads, width=width)


def keys(geometry: Geometry, array_BLGN: jax.Array) -> jax.Array:
    """Keys or queries, (B, L, G N)."""
    return _filled(padded(array_BLGN), 3, geometry.states).reshape(geometry.shape("keys"))


def public_keys(geometry: Geometry, array: jax.Array, like: jax.Array) -> jax.Array:
    """Gradients of keys or queries for an array like `like`: sums over the strips of a group."""
    _, length, groups, states = like.shape
    array = array.reshape(*array.shape[:2], groups, geometry.strips_per_group, geometry.states)
    array = array.sum(axis=3) if geometry.strips_per_group > 1 else array[:, :, :, 0]
    return array[:, :length, :, :states]


def packed_state(geometry: Geometry, state_BHPN: jax.Array) -> jax.Array:
    """States, (B, strips, blocks, N, lanes of a block), float32."""
    state = _filled(jnp.moveaxis(state_BHPN.astype(jnp.float32), 3, 1), 1, geometry.states)
    state = channels(geometry, state).reshape(*state.shape[:2], geometry.strips, geometry.blocks, geometry.lanes)
    return jnp.moveaxis(state, 1, 3)


def public_state(geometry: Geometry, state: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The inverse of `packed_state`, for states of a shape (B, H, P, N)."""
    batch, heads, width, states = shape
    state = jnp.moveaxis(state, 3, 1).reshape(batch, geometry.states, -1)
    return jnp.moveaxis(public_channels(geometry, state[:, :states], heads=heads, width=width), 1, 3)


def packed_vectors(geometry: Geometry, vectors: Arrays) -> jax.Array:
    """The vectors of `decays.py`, each (B, C, H, T), as rows of blocks."""
    rows = []
    for name in geometry.vectors:
        vector = jnp.repeat(vectors[name], geometry.pieces, axis=2) if geometry.pieces > 1 else vectors[name]
        vector = vector.reshape(*vector.shape[:2], geometry.groups, -1, CHUNK)
        vector = _filled(vector, 3, geometry.group_heads)
        vector = vector.reshape(*vector.shape[:2], geometry.strips, geometry.blocks, geometry.heads, CHUNK)
        rows.append(_filled(vector, 4, geometry.vector_rows))
    return jnp.concatenate(rows, axis=4)


def public_vectors(geometry: Geometry, rows: jax.Array, *, heads: int) -> Arrays:
    """`DVECTORS` of the op's heads by name, (B, C, H, T): sums over the pieces of a head."""
    found = {}
    for index, name in enumerate(DVECTORS):
        first = index * geometry.vector_rows
        vector = rows[..., first : first + geometry.heads, :]
        vector = vector.reshape(*rows.shape[:2], geometry.groups, geometry.group_heads, CHUNK)
        vector = vector[:, :, :, : heads // geometry.groups * geometry.pieces]
        found[name] = vector.reshape(*rows.shape[:2], heads, geometry.pieces, CHUNK).sum(axis=3)
    return found


def _filled(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros after the last element of an axis, up to `size`."""
    axis %= array.ndim
    return jnp.pad(array, [(0, size - length if i == axis else 0) for i, length in enumerate(array.shape)])
