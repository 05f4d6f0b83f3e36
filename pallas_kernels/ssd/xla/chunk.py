"""A chunk of the core as matrix products: equations 11 to 13 of README.md.

Arrays of a chunk are v (B, T, G, F, P), log_decay and scale (B, T, G, F), k and q (B, T, G, N), states (B, G, N, F, P).
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.array_types import Arrays


def advance(
    state_BGNFP: jax.Array, tokens: Arrays, D: jax.Array | None, *, precision: jax.lax.Precision
) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk, and the chunk's outputs, (B, T, G, F, P), in float32.

    Args:
        state_BGNFP: before the chunk.
        tokens: "v", "log_decay", "scale", "k" and "q" in float32, and where there are documents "document" (B, T),
            their number in the row, with "before" (B, 1), that of the last token before the chunk.
        D: (1, 1, G, F, 1 or P) skip connection.
        precision: of the products of values, keys and queries.
    """
    v_BTGFP, k_BTGN, q_BTGN = tokens["v"], tokens["k"], tokens["q"]
    gains_BTGFP = tokens["scale"][..., None] * v_BTGFP
    decays_BGFTT, entering_BTGF = decays(tokens)

    def product(subscripts: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *operands, precision=precision)

    scores_BGTT = product("btgn,bsgn->bgts", q_BTGN, k_BTGN)
    y_BTGFP = product("bgfts,bsgfp->btgfp", scores_BGTT[:, :, None] * decays_BGFTT, gains_BTGFP)
    y_BTGFP += entering_BTGF[..., None] * product("btgn,bgnfp->btgfp", q_BTGN, state_BGNFP)
    if D is not None:
        y_BTGFP += D * v_BTGFP
    leaving_BTGF = jnp.moveaxis(decays_BGFTT[..., -1, :], 3, 1)
    added_BGNFP = product("btgn,btgfp->bgnfp", k_BTGN, leaving_BTGF[..., None] * gains_BTGFP)
    return entering_BTGF[:, -1, :][:, :, None, :, None] * state_BGNFP + added_BGNFP, y_BTGFP


def decays(tokens: Arrays) -> tuple[jax.Array, jax.Array]:
    """Decays from each token to each, (B, G, F, T, T), and of the state that enters to each, (B, T, G, F)."""
    between_BGFTT, from_start_BGFT = _sums(jnp.moveaxis(tokens["log_decay"], 1, 3))
    length = between_BGFTT.shape[-1]
    counts_BTT = jnp.tri(length, dtype=bool)[None]
    if "document" in tokens:
        document_BT = tokens["document"]
        counts_BTT = counts_BTT & (document_BT[:, :, None] == document_BT[:, None, :])
        reaches_BT = document_BT == tokens["before"]
        from_start_BGFT = jnp.where(reaches_BT[:, None, None], from_start_BGFT, -jnp.inf)
    between_BGFTT = jnp.where(counts_BTT[:, None, None], between_BGFTT, -jnp.inf)
    return jnp.exp(between_BGFTT), jnp.moveaxis(jnp.exp(from_start_BGFT), 3, 1)


def _sums(log_decay_BGFT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of logarithms between each two tokens, (B, G, F, T, T), and from the chunk's start to each, (B, G, F, T).

    Each is a sum over the tokens in between alone, and not a difference of two, so that nothing cancels, neither here
    nor in the transpose, and a token outside of a pair does not touch its sum.
    """
    length = log_decay_BGFT.shape[-1]
    highest = jax.lax.Precision.HIGHEST
    # [i, k] and [k, j]: token k counts between j and i if j < k <= i.
    until_TT, after_TT = np.tri(length, dtype=np.float32), np.tri(length, k=-1, dtype=np.float32)
    until_BGFTT = log_decay_BGFT[..., None, :] * until_TT[None, None, None]
    between_BGFTT = jnp.einsum("bgfik,kj->bgfij", until_BGFTT, after_TT, precision=highest)
    return between_BGFTT, jnp.einsum("bgfk,ik->bgfi", log_decay_BGFT, until_TT, precision=highest)
