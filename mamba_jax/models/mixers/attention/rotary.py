"""Where tokens stand in their documents, and the rotation of queries and keys by it."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.common.array_types import Size
from pallas_kernels.common.segments import segment_starts


def positions_in_documents(
    length: Size,
    segment_ids: Int[jax.Array, "B L"] | None = None,
    before: Int[jax.Array, " B"] | None = None,
) -> Int[jax.Array, "B L"]:
    """Number of tokens before each one in its document.

    Args:
        length: L, number of tokens.
        segment_ids: document of each token; a document is a run of equal ids. None is one document.
        before: tokens of the first document that came before; None is none.

    Returns:
        (B, L), or (1, L) where all rows are alike.
    """
    index_L = jnp.arange(length, dtype=jnp.int32)[None]
    since_first = index_L if before is None else index_L + before[:, None]
    if segment_ids is None:
        return since_first
    start_BL = jax.lax.cummax(jnp.where(segment_starts(segment_ids), index_L, -1), axis=1)
    return jnp.where(start_BL < 0, since_first, index_L - start_BL)


def rotate(
    x: Float[jax.Array, "B L H P"], positions: Int[jax.Array, "#B L"], *, dims: int, theta: float
) -> Float[jax.Array, "B L H P"]:
    r"""Rotates the first channels of every head by the position of the token.

        [x_m, x_{m + d/2}] -> [x_m cos a - x_{m + d/2} sin a,  x_{m + d/2} cos a + x_m sin a]
        with a = position * theta^(-2 m / d), for m < d / 2

    Args:
        x: queries or keys.
        positions: of the tokens in their documents.
        dims: d, channels that are rotated; 0 leaves all as they are.
        theta: base of the angles.

    Returns:
        The rotated heads in the dtype of x; computed in float32.

    Source: arXiv 2104.09864, section 3.4.2, with the pairs that GPT-NeoX and Llama checkpoints have.
    """
    if dims == 0:
        return x
    half = dims // 2
    rates_M = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BLM = positions[:, :, None].astype(jnp.float32) * rates_M[None, None]
    cos, sin = jnp.cos(angles_BLM)[:, :, None], jnp.sin(angles_BLM)[:, :, None]
    one, other = x[..., :half].astype(jnp.float32), x[..., half:dims].astype(jnp.float32)
    rotated = jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., dims:]], axis=-1)
