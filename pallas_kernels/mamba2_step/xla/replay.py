"""A ring of the last tokens' inputs in place of a state that is written for every token, in plain JAX.

Suffixes spell shapes as elsewhere; J counts the places of the ring.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Inputs of the tokens that a state does not know yet, the first `length_B` places, computed in one dtype.

    Attributes:
        x_BJHP: inputs.
        B_BJHN: input matrices, of every head.
        dt_BJH: step sizes, 0 at places that are not taken.
    """

    x_BJHP: jax.Array
    B_BJHN: jax.Array
    dt_BJH: jax.Array

    def weights(self, A_H: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is left of each token's inflow after the last token (B, J, H), and of the state (B, H)."""
        passed_BJH = jnp.cumsum(self.dt_BJH, axis=1)
        total_BH = passed_BJH[:, -1]
        left_BJH = jnp.exp((total_BH[:, None] - passed_BJH) * A_H[None, None]) * self.dt_BJH
        return left_BJH, jnp.exp(total_BH * A_H[None])

    def settled(self, state_BHPN: jax.Array, A_H: jax.Array) -> jax.Array:
        """The state after the ring's tokens."""
        left_BJH, decay_BH = self.weights(A_H)
        highest = jax.lax.Precision.HIGHEST
        inflow_BHPN = jnp.einsum("bjh,bjhp,bjhn->bhpn", left_BJH, self.x_BJHP, self.B_BJHN, precision=highest)
        return decay_BH[:, :, None, None] * state_BHPN + inflow_BHPN

    def read(self, state_BHPN: jax.Array, C_BHN: jax.Array, A_H: jax.Array) -> jax.Array:
        """(B, H, P): the product with C of the state after the ring's tokens, which is not made."""
        left_BJH, decay_BH = self.weights(A_H)
        score_BJH = jnp.sum(self.B_BJHN * C_BHN[:, None], axis=-1) * left_BJH
        y_BHP = jnp.sum(score_BJH[..., None] * self.x_BJHP, axis=1)
        return decay_BH[:, :, None] * jnp.sum(state_BHPN * C_BHN[:, :, None], axis=-1) + y_BHP


def placed(ring_BJ: jax.Array, new_B: jax.Array, place_B: jax.Array) -> jax.Array:
    """The ring with a row's newest entry at its place."""
    is_place = jnp.arange(ring_BJ.shape[1])[None] == place_B[:, None]
    return jnp.where(is_place.reshape(*is_place.shape, *[1] * (ring_BJ.ndim - 2)), new_B[:, None], ring_BJ)


def ring_of(x_BJE: jax.Array, B_BJR: jax.Array, dt_BJH: jax.Array, *, length_B: jax.Array, states: int) -> Ring:
    """The ring of its arrays, of which only the first places are taken.

    Args:
        x_BJE: inputs.
        B_BJR: input matrices of all groups.
        dt_BJH: step sizes after bias, softplus and limits.
        length_B: places that are taken.
        states: N.
    """
    batch, length, heads = dt_BJH.shape
    is_taken_BJ = jnp.arange(length)[None] < length_B[:, None]
    grouped_BJGN = jnp.where(is_taken_BJ[..., None], B_BJR, 0).reshape(batch, length, -1, states)
    return Ring(
        # A place that was never written may hold anything, infinities included.
        x_BJHP=jnp.where(is_taken_BJ[..., None], x_BJE, 0).reshape(batch, length, heads, -1),
        B_BJHN=jnp.repeat(grouped_BJGN, heads // grouped_BJGN.shape[2], axis=2),
        dt_BJH=jnp.where(is_taken_BJ[..., None], dt_BJH, 0),
    )


def step_size(dt: jax.Array, dt_bias_H: jax.Array, limit: tuple[float, float]) -> jax.Array:
    """The step size (..., H) after bias, softplus and limits."""
    bias = dt_bias_H.reshape((1,) * (dt.ndim - 1) + (-1,))
    return jnp.clip(jax.nn.softplus(dt + bias), *limit)


def settled_state(
    state_BHPN: jax.Array,
    rings: Mapping[str, jax.Array],
    *,
    A_log_H: jax.Array,
    dt_bias_H: jax.Array,
    dt_limit: tuple[float, float],
) -> jax.Array:
    """The state after the tokens of a ring, for programs that read several tokens at once; float32.

    Args:
        state_BHPN: the state before them.
        rings: `ring_x`, `ring_B`, `ring_dt` and `ring_length` of `Mamba2Carry`.
        A_log_H: of the block, as are the others.
        dt_bias_H: added to step sizes.
        dt_limit: least and greatest step size.
    """
    x_BJE, B_BJR, dt_BJH = (rings[name].astype(jnp.float32) for name in ("ring_x", "ring_B", "ring_dt"))
    dt_BJH = step_size(dt_BJH, dt_bias_H.astype(jnp.float32), dt_limit)
    ring = ring_of(x_BJE, B_BJR, dt_BJH, length_B=rings["ring_length"], states=state_BHPN.shape[3])
    return ring.settled(state_BHPN.astype(jnp.float32), -jnp.exp(A_log_H.astype(jnp.float32)))
