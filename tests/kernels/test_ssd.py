"""State-space duality: contract of every implementation, extremes, and the reference against others' results."""

import pytest

from pallas_kernels import ssd
from pallas_kernels.ssd.arg_specs import FULL, SPECS, SSDSpec
from tests.kernels import op_contract
from tests.kernels.op_contract import Op, make_call

OP = Op(name="ssd", function=ssd)
IMPLEMENTATIONS = ("xla",)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_and_gradients(spec: SSDSpec, implementation: str) -> None:
    op_contract.check_values_and_gradients(OP, implementation, make_call(spec))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_backend_is_visible(implementation: str) -> None:
    op_contract.check_backend_is_visible(OP, implementation, make_call(FULL))
