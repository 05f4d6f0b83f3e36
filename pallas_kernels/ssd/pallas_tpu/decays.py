r"""What the tokens of a chunk hand to the kernels: two or three numbers each, computed by XLA.

With a_t the logarithm of the decay to base 2 and s_t the sum of a over the tokens of t's document in the chunk up to t,
the decay from token j to token i is 2^(s_i - s_j): a difference that is never positive, before the exponential. Of each
head and token there are

    scale  the factor of the values
    sum    s_i
    rest   what "sum" lacks of s_i, so that differences of float32 numbers are as good as sums of float32 numbers

Where products round their operands to bfloat16 there is no "rest": s_i is known to 2^-10 at worst, and the decay better
than an operand.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.register_math import LOG2_E
from pallas_kernels.ssd.pallas_tpu.geometry import CHUNK, Geometry

# A decay of so much to base 2 is 0 in float32. Sums over a chunk that hold no more of each token stay below 2^15.
_MOST = 150.0
# Sums of multiples of 2^-8 below 2^15 have 23 bits: they are exact. What is left of a token is at most 2^-9, and of the
# sum over a chunk 2^-2, whose rounding is 2^-27.
_STEPS = 2.0**8


def chunk_vectors(
    geometry: Geometry, log_decay_BLH: jax.Array, scale_BLH: jax.Array, starts_BL: jax.Array | None
) -> Arrays:
    """The vectors above by name, (B, C, H, T); sequences are padded to whole chunks.

    Args:
        geometry: sizes.
        log_decay_BLH: natural logarithm of the decays, float32.
        scale_BLH: factor of the values, float32.
        starts_BL: whether a document starts at a token; None unless documents are packed.
    """
    sums = _running_sums(geometry, log_decay_BLH, starts_BL)
    scale = jnp.swapaxes(_chunks(scale_BLH), 2, 3)
    return {"scale": scale} | dict(zip(("sum", "rest"), sums, strict=False))


def decay_gradient(dvectors: Arrays) -> jax.Array:
    """The gradient of log_decay, (B, C, H, T), from what the backward kernel writes: equation 15 of README.md.

    A token decays what passes it: the pairs around it, which are "between"; what enters the chunk on its way to the
    token and all later ones; and what leaves the chunk from all earlier ones.
    """
    # [i, k]: token i counts for k.
    until, before = jnp.tril(jnp.ones((CHUNK, CHUNK))), jnp.triu(jnp.ones((CHUNK, CHUNK)), k=1)

    def counted(name: str, mask: jax.Array) -> jax.Array:
        return jnp.einsum("bchi,ik->bchk", dvectors[name], mask, precision=jax.lax.Precision.HIGHEST)

    return dvectors["between"] + counted("enter", until) + counted("leave", before)


def documents(geometry: Geometry, starts_BL: jax.Array) -> jax.Array:
    """The number of starts in the chunk up to each token, (B, C, T): 0 if the document is older than the chunk."""
    starts = starts_BL.reshape(geometry.batch, geometry.chunks, CHUNK)
    return jnp.cumsum(starts, axis=2, dtype=jnp.int32)


def _running_sums(geometry: Geometry, log_decay_BLH: jax.Array, starts_BL: jax.Array | None) -> tuple[jax.Array, ...]:
    """The vector "sum", (B, C, H, T), and if products are exact "rest"."""
    rates_BLH = jnp.maximum(log_decay_BLH * LOG2_E, -_MOST)
    mask = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    if starts_BL is not None:
        # No decay leads into the first token of a document.
        rates_BLH = jnp.where(starts_BL[:, :, None], 0.0, rates_BLH)
        number = documents(geometry, starts_BL)
        mask = mask[None, None] & (number[..., :, None] == number[..., None, :])
    parts = [rates_BLH]
    if geometry.exact:
        coarse = jnp.round(rates_BLH * _STEPS) / _STEPS
        parts = [coarse, rates_BLH - coarse]
    subscripts = "bcjh,ij->bchi" if starts_BL is None else "bcjh,bcij->bchi"
    # A product with ones: one pass, in which every sum has the same order.
    return tuple(
        jnp.einsum(subscripts, _chunks(part), mask.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        for part in parts
    )


def _chunks(array_BLH: jax.Array) -> jax.Array:
    """(B, C, T, H)."""
    batch, length, heads = array_BLH.shape
    return array_BLH.reshape(batch, length // CHUNK, CHUNK, heads)
