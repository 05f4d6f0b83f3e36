"""Every form of the in-chunk recurrence gives what the token loop gives, whichever platform uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan.xla.recurrence import ASSOCIATIVE, ASSOCIATIVE_TIME_FIRST, SEQUENTIAL, Recurrence


def run(recurrence: Recurrence) -> list[np.ndarray]:
    """States and cotangents of a chunk of 13 tokens in time-first layout, (T, B, G, N, F)."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (13, 2, 1, 3, 5)
    a, u, dh = jax.random.uniform(keys[0], shape), *(jax.random.normal(key, shape) for key in keys[1:3])
    state, dstate = (jax.random.normal(key, shape[1:]) for key in keys[3:])
    arrange = lambda array: jnp.moveaxis(array, 0, recurrence.time_axis)  # noqa: E731
    before, after = recurrence.states(arrange(a), arrange(u), state)
    du, dfirst = recurrence.adjoint(arrange(a), arrange(dh), dstate)
    back = [np.asarray(jnp.moveaxis(array, recurrence.time_axis, 0)) for array in (before, after, du)]
    return [*back, np.asarray(dfirst)]


@pytest.mark.parametrize("recurrence", [ASSOCIATIVE, ASSOCIATIVE_TIME_FIRST], ids=lambda r: f"time axis {r.time_axis}")
def test_prefix_equals_the_token_loop(recurrence: Recurrence) -> None:
    for actual, expected in zip(run(recurrence), run(SEQUENTIAL), strict=True):
        # Decays are below 1, so sums stay of order 3 and their 13 roundings of 6e-8 add up to less than this.
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)
