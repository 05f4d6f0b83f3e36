"""The state update: contract of every implementation, and token-by-token equality with the scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import selective_scan, selective_state_update
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.selective_state_update.arg_specs import SPECS, StateUpdateSpec
from tests.kernels import op_contract
from tests.kernels.op_contract import Op, make_call

OP = Op(name="selective_state_update", function=selective_state_update)
IMPLEMENTATIONS = ("xla",)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_and_gradients(spec: StateUpdateSpec, implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, make_call(spec))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_backend_is_visible(implementation: str) -> None:
    op_contract.check_backend_is_visible(OP, implementation, make_call(SPECS[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_equal_the_scan(implementation: str) -> None:
    call = make_call(ScanSpec(name="steps", length=19, B="grouped"))
    scan = selective_scan(**call.arrays, **call.static, implementation="xla_sequential")
    sequences = {name: call.arrays[name] for name in ("x", "dt", "z", "B", "C")}
    constants = {name: call.arrays[name] for name in ("A", "D", "dt_bias")}

    def step(state, tokens):
        tokens |= {"C": tokens["C"][:, None]}
        outputs = selective_state_update(state, **tokens, **constants, **call.static, implementation=implementation)
        return outputs.state, outputs.y

    time_major = {name: jnp.moveaxis(array, 1, 0) for name, array in sequences.items()}
    state, y = jax.lax.scan(step, call.arrays["initial_state"], time_major)
    # Both run the same float32 equations; sums over N and products are rounded in another order.
    np.testing.assert_allclose(jnp.moveaxis(y, 0, 1), scan.y, rtol=0, atol=2e-6)
    np.testing.assert_allclose(state, scan.final_state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_two_dimensions_are_constant_where_the_batch_has_as_many_rows(implementation: str) -> None:
    """(E, N) with B = E is what it is with any other batch."""
    rng = np.random.default_rng(0)
    x, state, matrix = rng.normal(size=(4, 4)), rng.normal(size=(4, 4, 2)), rng.normal(size=(4, 2))
    whole = selective_state_update(state, x, x**2, -(matrix**2), matrix, matrix, implementation=implementation)
    first = selective_state_update(
        state[:1], x[:1], x[:1] ** 2, -(matrix**2), matrix, matrix, implementation=implementation
    )
    np.testing.assert_array_equal(whole.y[:1], first.y)
    np.testing.assert_array_equal(whole.state[:1], first.state)
