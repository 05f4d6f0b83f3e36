"""Documents that start inside a row from a learned state: what it adds to a recurrence that starts from zero."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pallas_kernels import DecayingAttentionArguments
from pallas_kernels.common.segments import segment_starts


def from_learned_state(
    arguments: DecayingAttentionArguments, initial: Float[jax.Array, "H P N"]
) -> tuple[Float[jax.Array, "B L H P"], Float[jax.Array, "B H P N"]]:
    """What documents after a row's first one add to the output and to the final state if they start from `initial`.

    The recurrence is linear: a document that starts at token s adds exp(sum of log_decay from s to t) initial q_t to
    y_t. The row's first document continues what the recurrence was given.

    Args:
        arguments: of the recurrence, with `segment_ids`; of the others `log_decay` and `q` matter.
        initial: the learned state.
    """
    assert arguments.segment_ids is not None
    starts_BL = segment_starts(arguments.segment_ids)

    def after(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] | second[0], jnp.where(second[0], second[1], first[1] + second[1])

    has_start_BL1, sums_BLH = jax.lax.associative_scan(after, (starts_BL[..., None], arguments.log_decay), axis=1)
    decays_BLH = jnp.exp(jnp.where(has_start_BL1, sums_BLH, -jnp.inf))
    heads, groups = initial.shape[0], arguments.q.shape[2]
    grouped = initial.astype(jnp.float32).reshape(groups, heads // groups, *initial.shape[1:])
    q_BLGN = arguments.q.astype(jnp.float32)
    read_out = jnp.einsum("blgn,gfpn->blgfp", q_BLGN, grouped, precision=jax.lax.Precision.HIGHEST)
    y_BLHP = decays_BLH[..., None] * read_out.reshape(*decays_BLH.shape, -1)
    return y_BLHP, decays_BLH[:, -1, :, None, None] * initial.astype(jnp.float32)[None]
