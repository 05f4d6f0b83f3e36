"""The causal convolution: contract of every implementation, and the reference against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d
from pallas_kernels.causal_conv1d.arg_specs import FULL, SPECS, ConvSpec
from tests.kernels import op_contract
from tests.kernels.op_contract import Op, make_call

OP = Op(name="causal_conv1d", function=causal_conv1d)
IMPLEMENTATIONS = ("xla",)
UNSEGMENTED = dataclasses.replace(FULL, has_segments=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_and_gradients(spec: ConvSpec, implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, make_call(spec))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_backend_is_visible(implementation: str) -> None:
    op_contract.check_backend_is_visible(OP, implementation, make_call(FULL))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("at", [2, 30])
def test_split_equals_one_pass(implementation: str, at: int) -> None:
    op_contract.check_split(OP, implementation, make_call(UNSEGMENTED), at=at)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality(implementation: str) -> None:
    op_contract.check_causality(OP, implementation, make_call(UNSEGMENTED), at=33)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments(implementation: str) -> None:
    op_contract.check_segments(OP, implementation, make_call(UNSEGMENTED), starts=(1, 43, 66))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_document_between_two_of_one_id_separates_them(implementation: str) -> None:
    x = jnp.ones((1, 3, 1))
    outputs = causal_conv1d(x, jnp.ones((3, 1)), segment_ids=jnp.asarray([[4, 7, 4]]), implementation=implementation)
    np.testing.assert_array_equal(outputs.y, x)
    np.testing.assert_array_equal(outputs.final_window[:, :, 0], [[0, 1]])


def test_reference_equals_numpy() -> None:
    arguments = UNSEGMENTED.arguments()
    v = arguments.wide | arguments.narrow
    padded = np.concatenate([v["initial_window"], v["x"]], axis=1)
    y = v["bias"] + sum(v["weight"][k] * padded[:, k : k + UNSEGMENTED.length] for k in range(UNSEGMENTED.width))
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(value) for name, value in v.items()}
        outputs = causal_conv1d(**arrays, activation="silu", implementation="reference")
        np.testing.assert_allclose(outputs.y, y / (1 + np.exp(-y)), rtol=0, atol=1e-13)
        np.testing.assert_array_equal(outputs.final_window, padded[:, -3:])
