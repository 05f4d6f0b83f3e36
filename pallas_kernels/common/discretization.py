"""From continuous to discrete parameters of the recurrence, in float32."""

import math

import jax
import jax.numpy as jnp

# Coefficients of phi(z) = (exp(z) - 1) / z = sum_k z^k / (k + 1)! and of its derivative. For |z| < 1 the first omitted
# terms are below 1 / 13! and 12 / 13!, under float32 rounding (6e-8) of values that are at least 0.26.
_PHI_SERIES = tuple(1 / math.factorial(k + 1) for k in range(12))
_PHI_DERIVATIVE_SERIES = tuple((k + 1) / math.factorial(k + 2) for k in range(11))


def step_size(dt: jax.Array, dt_bias: jax.Array | None, *, dt_softplus: bool) -> jax.Array:
    """Step size dt_t in float32, or in float64 if `dt` is; `dt_bias` has the rank of `dt`."""
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    if dt_bias is not None:
        dt = dt + dt_bias
    return jax.nn.softplus(dt) if dt_softplus else dt


@jax.custom_jvp
def zero_order_hold_gain(dt: jax.Array, A: jax.Array) -> jax.Array:
    """(exp(dt A) - 1) / A, without cancellation for small dt A, in value and in both derivatives.

    Args:
        dt: step size, real; broadcasts against A, of the same rank.
        A: decay rate, real or complex.
    """
    z = dt * A
    return dt * _with_series(z, _PHI_SERIES, _phi)


@zero_order_hold_gain.defjvp
def _zero_order_hold_gain_jvp(primals, tangents):
    """The derivatives are exp(dt A) by dt and dt^2 phi'(dt A) by A."""
    dt, A = primals
    dt_tangent, A_tangent = tangents
    z = dt * A
    by_A = dt * (dt * _with_series(z, _PHI_DERIVATIVE_SERIES, _phi_derivative))
    return zero_order_hold_gain(dt, A), jnp.exp(z) * dt_tangent + by_A * A_tangent


def _phi(z: jax.Array) -> jax.Array:
    return jnp.expm1(z) / z


def _phi_derivative(z: jax.Array) -> jax.Array:
    return (jnp.exp(z) - _phi(z)) / z


def _with_series(z: jax.Array, coefficients: tuple[float, ...], closed_form) -> jax.Array:
    """The power series where |z| < 1, the closed form elsewhere."""
    is_small = jnp.abs(z) < 1
    small = jnp.where(is_small, z, 0)
    series = jnp.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series = series * small + coefficient
    return jnp.where(is_small, series, closed_form(jnp.where(is_small, 1, z)))
