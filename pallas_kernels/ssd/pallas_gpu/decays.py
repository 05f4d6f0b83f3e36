r"""What the tokens of a chunk hand to the kernels: two numbers each, computed and differentiated by XLA.

With a_t the logarithm of the decay to base 2 and s_t the sum of a over the tokens of t's document in the chunk up to t,
the decay from token j to token i is 2^(s_i - s_j): a difference that is never positive, before the exponential.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.register_math import LOG2_E
from pallas_kernels.ssd.pallas_gpu.geometry import CHUNK, VECTORS, Geometry
from pallas_kernels.ssd.pallas_gpu.tensor_cores import ROWS

# A decay of so much to base 2 is 0 in float32. Sums over a chunk that hold no more of each token stay below 2^14, which
# leaves their differences a rounding of 2^-11, less than that of the operands of products.
_MOST = 150.0


def chunk_vectors(
    geometry: Geometry, log_decay_BLH: jax.Array, scale_BLH: jax.Array, starts_BL: jax.Array | None
) -> Arrays:
    """`VECTORS` of every chunk of every head, (B, H, chunks, CHUNK).

    "sum" is s above, "scale" the factor of the values, and "start", (B, chunks, CHUNK), the index in the chunk of the
    first token of the token's document, -1 if the document is older than the chunk.

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
        return {"sum": sums, "scale": scale}
    starts = starts_BL.reshape(geometry.batch, geometry.chunks, CHUNK)
    index = jnp.arange(CHUNK, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(starts, index[None, None], -1), axis=2)
    is_before = index[None, None, None] <= index[None, None, :, None]
    mask = (is_before & (index[None, None, None] >= first[..., None])).astype(jnp.float32)
    # No decay leads into the first token of a document.
    rates = jnp.where(starts[:, None], 0.0, rates)
    sums = jnp.einsum("bhcj,bcij->bhci", rates, mask, precision=jax.lax.Precision.HIGHEST)
    return {"sum": sums, "scale": scale, "start": first.astype(jnp.float32)}


def ends(vectors: Arrays) -> Arrays:
    """What joins a token to the chunk's two ends, as the kernels compute it from `chunk_vectors`.

    "enter" is the decay of the state before the chunk on its way to the token, 0 behind the start of a document, and
    "leave" the token's weight in the state after the chunk.
    """
    sums, scale = vectors["sum"], vectors["scale"]
    if "start" not in vectors:
        return {"enter": jnp.exp2(sums), "leave": scale * jnp.exp2(sums[..., -1:] - sums)}
    start = vectors["start"][:, None]
    continues, is_last = start < 0, start == start[..., -1:]
    enter = jnp.where(continues, jnp.exp2(jnp.where(continues, sums, 0.0)), 0.0)
    # Both exponents are made 0 where they are not used: their exponentials could be infinite.
    leave = jnp.where(is_last, scale * jnp.exp2(jnp.where(is_last, sums[..., -1:] - sums, 0.0)), 0.0)
    return {"enter": enter, "leave": leave}


class ChunkVectors:
    """The vectors of one head's chunk in a kernel.

    Attributes:
        memory: their place in shared memory, (V, CHUNK).
        packed: documents are packed.
    """

    def __init__(self, memory: Any, *, packed: bool):
        self.memory, self.packed = memory, packed

    def load(self, name: str, layout: Any = ROWS) -> jax.Array:
        """One of `VECTORS`, along the rows or the columns of a matrix."""
        return plgpu.load(self.memory.at[VECTORS.index(name)], layout=layout)

    def _last(self, name: str) -> jax.Array:
        return self.memory[VECTORS.index(name), CHUNK - 1]

    def enter(self) -> jax.Array:
        """See `ends`."""
        decays = jnp.exp2(self.load("sum"))
        return jnp.where(self.load("start") < 0.0, decays, 0.0) if self.packed else decays

    def leave(self) -> jax.Array:
        """See `ends`."""
        exponents = self._last("sum") - self.load("sum")
        if self.packed:
            exponents = jnp.where(self.load("start") == self._last("start"), exponents, -jnp.inf)
        return self.load("scale") * jnp.exp2(exponents)

    def decay(self) -> jax.Array:
        """The factor of the state from before the chunk to after it."""
        decay = jnp.exp2(self._last("sum"))
        return jnp.where(self._last("start") < 0.0, decay, 0.0) if self.packed else decay
