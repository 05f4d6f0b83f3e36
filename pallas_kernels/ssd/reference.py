"""State-space duality, token by token and straight from its equations: the oracle of every other implementation.

It computes in float64 if an argument has that precision and in float32 otherwise.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.segments import segment_starts
from pallas_kernels.ssd.arguments import DecayingAttentionArguments, SSDOutput


def decaying_attention(arguments: DecayingAttentionArguments) -> SSDOutput:
    """See `pallas_kernels.ssd.core`."""
    v_BLHP, k_BLGN = arguments.v, arguments.k
    batch, length, heads, width = v_BLHP.shape
    groups, states = k_BLGN.shape[2:]
    is_double = any(array.dtype == jnp.float64 for array in arguments.arrays().values())
    dtype = jnp.float64 if is_double else jnp.float32

    def time_first(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 1, 0).astype(dtype)

    def per_head(array_BLGN: jax.Array) -> jax.Array:
        return jnp.repeat(time_first(array_BLGN), heads // groups, axis=2)

    reset_LB = jnp.zeros((length, batch), bool)
    if arguments.segment_ids is not None:
        reset_LB = segment_starts(arguments.segment_ids).T
    state_BHPN = arguments.initial_state
    if state_BHPN is None:
        state_BHPN = jnp.zeros_like(v_BLHP, shape=(batch, heads, width, states))

    def step(state_BHPN, inputs):
        v_BHP, log_decay_BH, scale_BH, k_BHN, q_BHN, reset_B = inputs
        state_BHPN = jnp.where(reset_B[:, None, None, None], 0, state_BHPN)
        gain_BHP = scale_BH[:, :, None] * v_BHP
        state_BHPN = jnp.exp(log_decay_BH)[:, :, None, None] * state_BHPN + gain_BHP[..., None] * k_BHN[:, :, None]
        return state_BHPN, jnp.sum(state_BHPN * q_BHN[:, :, None], axis=-1)

    v_LBHP = time_first(v_BLHP)
    rates = time_first(arguments.log_decay), time_first(arguments.scale)
    inputs = (v_LBHP, *rates, per_head(k_BLGN), per_head(arguments.q), reset_LB)
    state_BHPN, y_LBHP = jax.lax.scan(step, state_BHPN.astype(dtype), inputs)
    if arguments.D is not None:
        y_LBHP = y_LBHP + arguments.D.astype(dtype).reshape(1, 1, heads, -1) * v_LBHP
    return SSDOutput(y=jnp.moveaxis(y_LBHP, 0, 1).astype(v_BLHP.dtype), final_state=state_BHPN)
