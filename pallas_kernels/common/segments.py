"""Documents packed into one row: where they start, and which tokens belong together."""

import jax
import jax.numpy as jnp


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """(B, L), whether a document starts at a token; the first token continues what came before it."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def count_segments(segment_ids: jax.Array, past: int) -> jax.Array:
    """Number of starts up to each token, (B, past + L), 0 for the tokens before: equal exactly within a document."""
    is_start = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(is_start, ((0, 0), (past + 1, 0))), axis=1, dtype=jnp.int32)
