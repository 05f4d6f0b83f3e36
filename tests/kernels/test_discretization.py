"""The zero-order hold and softplus in float32, elementwise against float64 over forty orders of magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.discretization import step_size, zero_order_hold_gain

MAGNITUDES = np.concatenate([10.0 ** np.arange(-30, 3, 0.37), [0.999, 1.0, 1.001, 0.5, 2.0]])
# A few roundings in a row (product, exp or a Horner step each, quotient), each half an epsilon; where exp(z) is the
# result, rounding its argument costs |z| / 2 epsilons more.
EPSILON = float(np.finfo(np.float32).eps)


def _gain_and_derivatives(dt, A):
    """In double precision, from Taylor series below |z| = 1e-2 and from the closed forms above."""
    z = dt * A
    small = np.where(np.abs(z) < 1e-2, z, 0)
    large = np.where(np.abs(z) < 1e-2, 1, z)
    phi = np.where(np.abs(z) < 1e-2, 1 + small / 2 + small**2 / 6 + small**3 / 24, np.expm1(large) / large)
    closed = (np.exp(large) * (large - 1) + 1) / large**2
    slope = np.where(np.abs(z) < 1e-2, 1 / 2 + small / 3 + small**2 / 8 + small**3 / 30 + small**4 / 144, closed)
    return dt * phi, np.exp(z), dt * dt * slope


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.5])
def test_zero_order_hold_has_no_cancellation(angle: float) -> None:
    A = np.float32(-1.7) if angle == 0 else np.complex64(-1.7 * np.exp(1j * angle))
    dt = (MAGNITUDES / 1.7).astype(np.float32)
    dt = dt[dt > 1e-18]  # dt^2, the scale of the derivative by A, is a normal number only from here on
    A = np.full(dt.shape, A)
    gain, vjp = jax.vjp(zero_order_hold_gain, jnp.asarray(dt), jnp.asarray(A))
    expected, by_dt, by_A = _gain_and_derivatives(dt.astype(np.float64), A.astype(np.complex128))
    z = np.abs(dt * A)
    np.testing.assert_array_less(np.abs(gain - expected), 6 * EPSILON * np.abs(expected))
    dt_bar, A_bar = vjp(jnp.ones_like(gain))
    np.testing.assert_array_less(np.abs(dt_bar - by_dt.real), (2 + z) * EPSILON * np.abs(by_dt) + 1e-37)
    np.testing.assert_array_less(np.abs(A_bar - by_A), 10 * EPSILON * np.abs(by_A))


def test_softplus_is_accurate_in_both_tails() -> None:
    dt = np.concatenate([-(10.0 ** np.arange(-5, 1.9, 0.1)), 10.0 ** np.arange(-5, 5, 0.1)]).astype(np.float32)
    value, vjp = jax.vjp(lambda dt: step_size(dt, None, dt_softplus=True), jnp.asarray(dt))
    wide = dt.astype(np.float64)
    expected = np.logaddexp(wide, 0)
    np.testing.assert_array_less(np.abs(value - expected), 4 * EPSILON * expected)
    (slope,) = vjp(jnp.ones_like(value))
    expected = 1 / (1 + np.exp(-wide))
    np.testing.assert_array_less(np.abs(slope - expected), (4 + np.abs(np.minimum(wide, 0))) * EPSILON * expected)
