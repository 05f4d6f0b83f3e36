"""The ops on devices that share their arrays: inside shard_map, under explicit axes, compiled for TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mamba_jax.pods.hlo import compiled_instructions
from pallas_kernels import (
    TABLES,
    causal_conv1d,
    selective_scan,
)
from pallas_kernels.common.ahead_of_time import tpu_devices
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from tests.kernels.cases import (
    CASES,
    assert_close,
    number,
    outputs_and_gradients,
    skip_off_platform,
    unsharded,
    with_ops,
)
from tests.kernels.op_contract import make_call
from tests.kernels.test_selective_scan_pallas_tpu import needs_tpu_compiler
from tests.programs import text_of


def _mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("rows", "lanes"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def _spec(letters: str) -> PartitionSpec:
    # Two groups of channels or heads, which lie with these.
    split = {"B": "rows"} | dict.fromkeys("EHG", "lanes")
    return PartitionSpec(*(split.get(letter) for letter in letters))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@with_ops("scan", "convolution")
def test_inside_shard_map(name: str) -> None:
    """Over the batch and over channels, with the check of varying axes; what devices share gets the whole gradient."""
    case = CASES[name]
    specs = [{name: _spec(case.letters[name]) for name in given} for given in (case.arrays, case.fixed)]
    run = jax.shard_map(
        case.run, mesh=_mesh(AxisType.Auto), in_specs=tuple(specs), out_specs=tuple(map(_spec, case.outputs))
    )
    assert_close(outputs_and_gradients(run, case, case.arrays), unsharded(name))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@with_ops("scan", "update", "heads")
def test_under_explicit_axes(name: str) -> None:
    """Outputs are split as x is, whatever way the other arguments lie; gradients as the arguments are."""
    case = CASES[name]
    mesh = _mesh(AxisType.Explicit)
    first = "dy" if "dy" in case.arrays else "x"
    given = case.arrays | {first: jax.device_put(case.arrays[first], NamedSharding(mesh, _spec(case.letters[first])))}
    with jax.set_mesh(mesh):
        outputs, gradients = outputs_and_gradients(case.run, case, given)
    assert [output.sharding.spec for output in outputs] == [_spec(letters) for letters in case.outputs]
    assert gradients[first].sharding.spec == _spec(case.letters[first])
    assert_close((outputs, gradients), unsharded(name))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_channels_that_would_cut_a_group_stay_whole() -> None:
    case = CASES["scan"]
    mesh = jax.make_mesh((4,), ("lanes",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        x = jax.device_put(case.arrays["x"], PartitionSpec(None, None, "lanes"))
        outputs = jax.jit(case.run)(case.arrays | {"x": x}, case.fixed)
    assert_close(outputs, unsharded("scan")[0])


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("scan", name) for name in ("xla_associative", "reference", "pallas_tpu", "pallas_gpu")]
    + [("convolution", name) for name in ("reference", "pallas_tpu", "pallas_gpu")]
    + [("update", "reference"), ("final state", "pallas_tpu"), ("initial cotangent", "pallas_gpu")],
)
def test_types_hold_inside_shard_map(name: str, implementation: str) -> None:
    """Every implementation can be traced there, with its gradient if it has one: JAX checks the types."""
    skip_off_platform(implementation)
    case = CASES[name]
    has_gradient = "state" not in name.split() and "cotangent" not in name
    specs = [{name: _spec(case.letters[name]) for name in given} for given in (case.arrays, case.fixed)]

    def run(arrays: Any, fixed: Any) -> Any:
        if not has_gradient:
            return case.run(arrays, fixed, implementation)
        return jax.grad(case.loss)(arrays, fixed, implementation)

    out_specs = specs[0] if has_gradient else tuple(map(_spec, case.outputs))
    mapped = jax.shard_map(run, mesh=_mesh(AxisType.Auto), in_specs=tuple(specs), out_specs=out_specs)
    shapes = jax.eval_shape(mapped, case.arrays, case.fixed)
    assert all(shape.size for shape in jax.tree.leaves(shapes))


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["shard_map", "explicit axes"])
def test_compiled_for_tpus_every_device_runs_kernels_on_its_part(kind: AxisType) -> None:
    mesh = Mesh(np.array(tpu_devices("v5e:2x2")).reshape(2, 2), ("rows", "lanes"), axis_types=(kind,) * 2)
    spec = ScanSpec(name="v5e", batch=4, length=256, channels=512, states=16, dtype="bfloat16")
    arrays, table = make_call(spec).arrays, TABLES["selective_scan"]
    specs = {name: _spec(table.letters(name, array)) for name, array in arrays.items()}
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, array in arrays.items()
    }

    def layer(arrays: dict[str, Any]) -> jax.Array:
        y = selective_scan(**arrays, dt_softplus=True).y
        return causal_conv1d(y, jnp.ones((4, y.shape[2]))).y

    run = layer if kind == AxisType.Explicit else jax.shard_map(layer, in_specs=(specs,), out_specs=specs["x"])
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda arrays: number((run(arrays).astype(jnp.float32),))))
        text = text_of(gradient.lower(shapes).compile())
    instructions = [line for line, _ in compiled_instructions(text)]
    assert sum("tpu_custom_call" in line for line in instructions) == 4
    assert any(" all-reduce(" in line for line in instructions)
    assert not any(" all-gather" in line for line in instructions)
