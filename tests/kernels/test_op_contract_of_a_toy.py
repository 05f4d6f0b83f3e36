"""An op that the library does not know passes the contract of ops, and models call it over devices by its table."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mamba_jax.models.ops import ShardedOp
from mamba_jax.sharding import make_mesh
from mamba_jax.sharding.config import MeshConfig
from pallas_kernels.common.arg_spec import Arguments, DType, Manifest, Tolerance, Work
from pallas_kernels.manifests import MANIFESTS
from tests.kernels import op_contract
from tests.kernels.op_contract import Op, make_call
from tests.toys.op import moving_average

OP = Op(name="moving_average", function=moving_average)


@dataclasses.dataclass(frozen=True)
class AverageSpec:
    """A call of two rows."""

    name: str
    dtype: DType = "float32"
    length: int = 29
    has_segments: bool = False

    def arguments(self, seed: int = 0) -> Arguments:
        rng = np.random.default_rng(seed)
        ids = {"segment_ids": np.cumsum(rng.random((2, self.length)) < 0.2, axis=1).astype(np.int32)}
        return Arguments(
            wide={"rate": rng.normal(size=4), "initial_state": rng.normal(size=(2, 4))},
            narrow={"x": rng.normal(size=(2, self.length, 4))},
            integers=ids if self.has_segments else {},
            static={},
        )


FULL = AverageSpec(name="full")
MANIFESTS["moving_average"] = Manifest(
    sizes=("length",),
    tested=(FULL, AverageSpec(name="bfloat16", dtype="bfloat16", has_segments=True)),
    tolerance=Tolerance(longest_sum={"BL": 1}, because="the gradient of the rate adds over all tokens"),
    forward=Work(vector={"BLE": 3}, special={"E": 2}),
    backward=Work(vector={"BLE": 6}),
)


@pytest.mark.parametrize("spec", MANIFESTS["moving_average"].tested, ids=lambda spec: spec.name)
def test_contract(spec: AverageSpec) -> None:
    call = make_call(spec)
    op_contract.check_values_and_gradients(OP, "xla", call)
    op_contract.check_backend_is_visible(OP, "xla", call)


def test_contract_in_time() -> None:
    call = make_call(FULL)
    op_contract.check_split(OP, "xla", call, at=11)
    op_contract.check_causality(OP, "xla", call, at=11)
    op_contract.check_segments(OP, "xla", call, starts=(7, 20))


def test_bad_arguments_are_one_line() -> None:
    x, rate = np.ones((2, 5, 4)), np.ones(4)
    for arguments, message in (
        ({"x": x[0]}, r"moving_average: x has shape \(5, 4\), expected non-empty \(B, L, E\)"),
        ({"rate": rate[1:]}, r"rate has shape \(3,\), expected \(E,\) = \(4,\)"),
        ({"segment_ids": x[:, :, 0]}, "segment_ids has dtype float32, expected an integer dtype"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'; choose None or one of reference, xla"),
    ):
        with pytest.raises(ValueError, match=message):
            moving_average(**({"x": x, "rate": rate} | arguments))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_over_devices() -> None:
    call = make_call(FULL)
    expected = moving_average(**call.arrays)
    sharded = ShardedOp(moving_average)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        found = jax.jit(lambda arrays: sharded(**arrays))(call.arrays)
    np.testing.assert_allclose(found.y, expected.y, rtol=0, atol=1e-6)
    mesh = jax.make_mesh((2, 4), ("rows", "channels"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.asarray(call.arrays["x"]), jax.sharding.PartitionSpec("rows", None, "channels"))
        y = moving_average(**(call.arrays | {"x": x})).y
    assert jax.typeof(y).sharding.spec == jax.sharding.PartitionSpec("rows", None, "channels")
    np.testing.assert_allclose(y, expected.y, rtol=0, atol=1e-6)


def test_the_page_shows_the_op() -> None:
    root = Path(__file__).parents[2]
    op = (root / "tests" / "toys" / "op.py").read_text()
    assert f"```python\n{op}```" in (root / "docs" / "add_an_op.md").read_text()
    assert op.count("\n") < 60
