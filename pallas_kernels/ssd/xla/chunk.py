"""A chunk of the core as matrix products: equations 11 to 13 of README.md.

Arrays of a chunk are v (B, T, G, F, P), log_decay and scale (B, T, G, F), k and q (B, T, G, N), states (B, G, N, F, P).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays

# exp(-104) is 0 in float32.
_ALL_NATS = 104.0
# Multiples of 1/512 have exact sums over a chunk: 256 tokens of 104 nats are 2^14.7, and float32 has 24 bits.
_GRID = 512.0


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
    sums_BTGF2, precedes_BTT = _sums(tokens)
    sums_BGFT2 = jnp.moveaxis(sums_BTGF2, 1, 3)
    between = sums_BGFT2[:, :, :, :, None] - sums_BGFT2[:, :, :, None, :]
    # What does not count is -inf before the exponential, and a token's own value does not decay, whatever the sums are.
    is_own_TT = jnp.eye(precedes_BTT.shape[1], dtype=bool)
    uncounted_TT = jnp.where(is_own_TT, 0.0, -jnp.inf)
    counts = precedes_BTT[:, None, None] & ~is_own_TT[None, None, None]
    between_BGFTT = jnp.where(counts, between.sum(axis=-1), uncounted_TT[None, None, None])
    entering_BTGF = sums_BTGF2.sum(axis=-1)
    if "document" in tokens:
        reaches_BT = tokens["document"] == tokens["before"]
        entering_BTGF = jnp.where(reaches_BT[:, :, None, None], entering_BTGF, -jnp.inf)
    return jnp.exp(between_BGFTT), jnp.exp(entering_BTGF)


def _sums(tokens: Arrays) -> tuple[jax.Array, jax.Array]:
    """Sums of logarithms from the start of the chunk, or of the token's document in it, in two pieces whose sum is meant.

    Returns:
        (B, T, G, F, 2) sums, and (B or 1, T, T), whether the second token counts for the first one.
    """
    log_decay_BTGF = jnp.maximum(tokens["log_decay"], -_ALL_NATS)
    length = log_decay_BTGF.shape[1]
    coarse_BTGF = jax.lax.stop_gradient(jnp.round(log_decay_BTGF * _GRID) / _GRID)
    pieces_BTGF2 = jnp.stack([coarse_BTGF, log_decay_BTGF - coarse_BTGF], axis=-1)
    precedes_BTT = jnp.tri(length, dtype=bool)[None]
    if "document" in tokens:
        document_BT = tokens["document"]
        precedes_BTT = precedes_BTT & (document_BT[:, :, None] == document_BT[:, None, :])
    # One matrix for all rows is left without a batch, or each row would multiply by its copy.
    is_shared = precedes_BTT.shape[0] == 1
    matrix, subscripts = (precedes_BTT[0], "ts,bsgfi->btgfi") if is_shared else (precedes_BTT, "bts,bsgfi->btgfi")
    matrix = matrix.astype(jnp.float32)
    return jnp.einsum(subscripts, matrix, pieces_BTGF2, precision=jax.lax.Precision.HIGHEST), precedes_BTT
