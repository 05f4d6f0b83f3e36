"""Attention by matrix products that XLA compiles anywhere, some queries at a time."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from mamba_jax.models.mixers.attention.attend import Attended

# Scores that exist at the same time, 64 MiB of float32.
_MOST_SCORES = 2**24


def attend(arguments: "Attended") -> jax.Array:
    """See `attend`: queries go in chunks, whose scores the backward pass computes again."""
    q, k, v = arguments.q, arguments.k, arguments.v
    length, scores = q.shape[1], q.shape[0] * q.shape[2] * k.shape[1]
    own = (0 if arguments.first is None else arguments.first) + jnp.arange(length, dtype=jnp.int32)[None]
    reach = own if arguments.positions is None else arguments.positions
    if arguments.window is not None:
        reach = jnp.minimum(reach, arguments.window - 1)
    # How many rows a program for any number of them gets is not known, but its queries are few.
    chunk = max(1, _MOST_SCORES // scores) if isinstance(scores, int) else length
    some = functools.partial(_attend_some, k=k, v=v, window=arguments.window, scale=arguments.scale)
    if chunk >= length:
        return some((q, own, reach))
    count = -(-length // chunk)

    def in_chunks(array: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (array.ndim - 2)
        return jnp.moveaxis(jnp.pad(array, padding).reshape(array.shape[0], count, chunk, *array.shape[2:]), 1, 0)

    body = jax.checkpoint(some, prevent_cse=False)
    y_CBTHP = jax.lax.map(body, (in_chunks(q), in_chunks(own), in_chunks(reach)))
    return jnp.moveaxis(y_CBTHP, 0, 1).reshape(q.shape[0], count * chunk, *q.shape[2:])[:, :length]


def _attend_some(
    queries: tuple[jax.Array, jax.Array, jax.Array], *, k: jax.Array, v: jax.Array, window: int | None, scale: float
) -> jax.Array:
    """Attention of some consecutive queries, each given with its own index and how far back it reaches."""
    q, own, reach = queries
    index = jnp.arange(k.shape[1], dtype=jnp.int32)
    span = k.shape[1] if window is None else q.shape[1] + window - 1
    if span < k.shape[1]:
        start = jnp.clip(own[0, 0] - (span - q.shape[1]), 0, k.shape[1] - span)
        k, v, index = (jax.lax.dynamic_slice_in_dim(x, start, span, axis=x.ndim > 1) for x in (k, v, index))
    age = own[:, :, None] - index[None, None]
    return attend_visible(q, k, v, (age >= 0) & (age <= reach[:, :, None]), scale=scale)


def attend_visible(
    q: Float[jax.Array, "B L H P"],
    k: Float[jax.Array, "B S K P"],
    v: Float[jax.Array, "B S K P"],
    is_visible: Bool[jax.Array, "#B L S"],
    *,
    scale: float,
) -> Float[jax.Array, "B L H P"]:
    """Attention of all queries to the keys that each can see, all scores at once."""
    return jax.nn.dot_product_attention(q, k, v, mask=is_visible[:, None], scale=scale, implementation="xla")
