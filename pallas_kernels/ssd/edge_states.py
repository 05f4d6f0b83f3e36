r"""What a run of tokens does to the states at its two edges, without outputs: equation 16 of README.md.

With l_jk the sum of the logarithms of the decays after token j, up to and with token k, the tokens 1..L leave behind,
from a zero state,

    S_L = sum_t exp(l_tL) scale_t v_t k_t^T

and the cotangents of y alone make the cotangent of the state that enters

    dS_0 = sum_t exp(l_0t) dy_t q_t^T

Tokens with a segment's start between them and the edge contribute nothing. A device that holds a part of a sequence
learns from these what it passes on to others, before it can start its own part. Each is a matrix product, in plain JAX
whatever the backend of the op.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.common.segments import segment_starts
from pallas_kernels.ssd.arguments import DecayingAttentionArguments


def ssd_final_state(arguments: DecayingAttentionArguments) -> Float[jax.Array, "B H P N"]:
    """The `final_state` of the op from a zero initial state, in float32.

    Args:
        arguments: of the core; `q`, `D` and `initial_state` do not matter.
    """
    log_decay_BLH = arguments.log_decay
    # A token's own decay is not on its way to the end.
    to_end_BLH = jnp.pad(log_decay_BLH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    sums_BLH = jax.lax.cumsum(to_end_BLH, axis=1, reverse=True)
    if arguments.segment_ids is not None:
        starts_BL = _starts(arguments.segment_ids)
        starts_after_BL = jnp.sum(starts_BL, axis=1, keepdims=True) - jnp.cumsum(starts_BL, axis=1)
        sums_BLH = jnp.where((starts_after_BL == 0)[:, :, None], sums_BLH, -jnp.inf)
    return _weighted_sum(jnp.exp(sums_BLH) * arguments.scale, arguments.v, arguments.k)


def ssd_initial_cotangent(
    dy: Float[jax.Array, "B L H P"], arguments: DecayingAttentionArguments
) -> Float[jax.Array, "B H P N"]:
    """The cotangent of the op's `initial_state`, where that of `final_state` is zero, in float32.

    Args:
        dy: (B, L, H, P) cotangent of y.
        arguments: of the core; `q`, `log_decay` and `segment_ids` matter.
    """
    sums_BLH = jax.lax.cumsum(arguments.log_decay, axis=1)
    if arguments.segment_ids is not None:
        starts_before_BL = jnp.cumsum(_starts(arguments.segment_ids), axis=1)
        sums_BLH = jnp.where((starts_before_BL == 0)[:, :, None], sums_BLH, -jnp.inf)
    return _weighted_sum(jnp.exp(sums_BLH), dy, arguments.q)


def _starts(segment_ids: Int[jax.Array, "B L"]) -> Int[jax.Array, "B L"]:
    return segment_starts(segment_ids).astype(jnp.int32)


def _weighted_sum(weights_BLH: jax.Array, values_BLHP: jax.Array, matrix_BLGN: jax.Array) -> jax.Array:
    """The sum over tokens of weight times values times matrix, (B, H, P, N)."""
    batch, length, heads, width = values_BLHP.shape
    groups, states = matrix_BLGN.shape[2:]
    weighted = (weights_BLH[..., None] * values_BLHP.astype(weights_BLH.dtype)).reshape(
        batch, length, groups, heads // groups, width
    )
    total = jnp.einsum(
        "blgfp,blgn->bgfpn", weighted, matrix_BLGN.astype(weighted.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return total.reshape(batch, heads, width, states)
