r"""What the tokens of a chunk hand to the kernels: a few numbers each, computed and differentiated by XLA.

With a_t the logarithm of the decay to base 2 and s_t the sum of a over the tokens of t's document in the chunk up to t,
the decay from token j to token i is 2^(s_i - s_j): a difference that is never positive, before the exponential.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.register_math import LOG2_E
from pallas_kernels.ssd.pallas_gpu.geometry import CHUNK, VECTORS, Geometry

# A decay of so much to base 2 is 0 in float32. Sums over a chunk that hold no more of each token stay below 2^14, which
# leaves their differences a rounding of 2^-11, less than that of the operands of products.
_MOST = 150.0


def chunk_vectors(
    geometry: Geometry, log_decay_BLH: jax.Array, scale_BLH: jax.Array, starts_BL: jax.Array | None
) -> jax.Array:
    """The rows `VECTORS` of every chunk of every head: (B, H, chunks, V, CHUNK).

    "sum" is s above, "scale" the factor of the values, "enter" the decay of the state before the chunk on its way to
    the token, 0 behind the start of a document, "leave" the token's weight in the state after the chunk, and "start"
    the index in the chunk of the first token of the token's document.

    Args:
        geometry: sizes.
        log_decay_BLH: natural logarithm of the decays, float32, of the geometry's length and heads.
        scale_BLH: of the values, float32.
        starts_BL: whether a document starts at a token; None unless documents are packed.
    """
    shape = (geometry.batch, geometry.heads, geometry.chunks, CHUNK)
    rates_BLH = jnp.maximum(log_decay_BLH * LOG2_E, -_MOST)
    rates, scale = (jnp.moveaxis(array, 2, 1).reshape(shape) for array in (rates_BLH, scale_BLH))
    if starts_BL is None:
        # A product with ones: one pass, in which every sum of a chunk has the same order.
        mask = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))
        sums = jnp.einsum("bhcj,ij->bhci", rates, mask, precision=jax.lax.Precision.HIGHEST)
        enter, leave = jnp.exp2(sums), scale * jnp.exp2(sums[..., -1:] - sums)
        return jnp.stack([sums, scale, enter, leave], axis=3)
    starts = starts_BL.reshape(geometry.batch, geometry.chunks, CHUNK)
    index = jnp.arange(CHUNK, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(starts, index[None, None], 0), axis=2)
    is_before = index[None, None, None] <= index[None, None, :, None]
    mask = (is_before & (index[None, None, None] >= first[..., None])).astype(jnp.float32)
    # No decay leads into the first token of a document.
    rates = jnp.where(starts[:, None], 0.0, rates)
    sums = jnp.einsum("bhcj,bcij->bhci", rates, mask, precision=jax.lax.Precision.HIGHEST)
    continues = ~jax.lax.cummax(starts.astype(jnp.int8), axis=2).astype(bool)[:, None]
    is_last = (first == first[..., -1:])[:, None] & (continues == continues[..., -1:])
    enter = jnp.where(continues, jnp.exp2(jnp.where(continues, sums, 0.0)), 0.0)
    # Both exponents are made 0 where they are not used: their exponentials could be infinite.
    leave = jnp.where(is_last, scale * jnp.exp2(jnp.where(is_last, sums[..., -1:] - sums, 0.0)), 0.0)
    first = jnp.broadcast_to(first[:, None], shape).astype(jnp.float32)
    return jnp.stack([sums, scale, enter, leave, first], axis=3)


def row(name: str) -> int:
    """Index of one of `VECTORS`."""
    return VECTORS.index(name)
