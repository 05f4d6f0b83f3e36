"""Sequences, (B, L, ...), in pieces: documents packed into one row, and chunks of T tokens, sliced where they lie."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.rounding import round_up


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """(B, L), whether a document starts at a token; the first token continues what came before it."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def count_segments(segment_ids: jax.Array, past: int) -> jax.Array:
    """Number of starts up to each token, (B, past + L), 0 for the tokens before: equal exactly within a document."""
    is_start = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(is_start, ((0, 0), (past + 1, 0))), axis=1, dtype=jnp.int32)


def padded(array: jax.Array, chunk_length: int) -> jax.Array:
    """Zeros after the last token, up to a whole number of chunks."""
    padding = round_up(array.shape[1], chunk_length) - array.shape[1]
    return jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))


def chunk_of(sequences: Arrays, index: jax.Array, chunk_length: int) -> Arrays:
    """The chunk `index` of every sequence, (B, T, ...)."""
    start = index * chunk_length
    return {k: jax.lax.dynamic_slice_in_dim(v, start, chunk_length, axis=1) for k, v in sequences.items()}


def with_chunk(sequence: jax.Array, chunk: jax.Array, index: jax.Array) -> jax.Array:
    """The sequence with the chunk `index` replaced, in the sequence's dtype."""
    start = index * chunk.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(sequence, chunk.astype(sequence.dtype), start, axis=1)
