"""Channels in groups that share B and C, padded to the blocks that kernels work on."""

import jax
import jax.numpy as jnp


def pad_channels(array: jax.Array, *, groups: int, channels: int) -> jax.Array:
    """(..., E) to (..., G F) for G groups, each padded with zeros to F channels."""
    if array.shape[-1] == groups * channels:
        return array
    grouped = array.reshape(*array.shape[:-1], groups, -1)
    padding = channels - grouped.shape[-1]
    grouped = jnp.pad(grouped, ((0, 0),) * (grouped.ndim - 1) + ((0, padding),))
    return grouped.reshape(*array.shape[:-1], groups * channels)


def unpad_channels(array: jax.Array, *, groups: int, channels: int) -> jax.Array:
    """(..., G F) to the (..., E) that `pad_channels` has padded; E is `channels`."""
    if array.shape[-1] == channels:
        return array
    grouped = array.reshape(*array.shape[:-1], groups, -1)
    return grouped[..., : channels // groups].reshape(*array.shape[:-1], channels)


def group_count(*matrices: jax.Array) -> int:
    """Groups of B and C, of which one may have a single group for all channels."""
    return max(matrix.shape[2] if matrix.ndim == 4 else 1 for matrix in matrices)


def per_group(matrix: jax.Array, groups: int) -> jax.Array:
    """(B, L, N) or (B, L, 1 or G, N) to (B, L, G, N)."""
    matrix = matrix[:, :, None] if matrix.ndim == 3 else matrix
    return jnp.broadcast_to(matrix, (*matrix.shape[:2], groups, matrix.shape[3]))


def gradient_of_matrix(gradient: jax.Array, matrix: jax.Array) -> jax.Array:
    """The gradient of a matrix from that of `per_group`, (B, L, G, N): summed over groups if one serves them all."""
    if matrix.ndim == 3 or matrix.shape[2] != gradient.shape[2]:
        gradient = gradient.sum(axis=2, keepdims=True)
    return gradient.reshape(matrix.shape)
