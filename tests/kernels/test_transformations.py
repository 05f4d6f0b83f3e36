"""The ops under JAX's transformations: forward mode, second derivatives, vmap, meshes of every kind, export, lists."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mamba_jax.pods.hlo import compiled_instructions
from pallas_kernels import (
    TABLES,
    causal_conv1d,
    selective_scan,
    selective_scan_final_state,
    selective_scan_initial_cotangent,
    selective_state_update,
    ssd,
    ssd_state_update,
)
from pallas_kernels.causal_conv1d.arg_specs import ConvSpec
from pallas_kernels.common.ahead_of_time import tpu_devices
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.ssd.arg_specs import SSDSpec
from tests.kernels.op_contract import make_call
from tests.kernels.test_selective_scan_pallas_tpu import needs_tpu_compiler

SCAN = ScanSpec(name="scan", length=19, batch=4, channels=8, states=3, B="grouped", has_segments=True)
HEADS = SSDSpec(name="heads", length=19, batch=4, heads=8, width=2, states=3, has_segments=True)
CONV = ConvSpec(name="conv", length=9, batch=4, channels=8, has_segments=True)
# Two orders of summation of the same float32 equations: 4 x 19 tokens, 8 channels and 3 states.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


ON_GPU = jax.default_backend() == "gpu"


def with_ops(*default: str) -> pytest.MarkDecorator:
    """Every op; those that are not named by the slow tests only."""
    return pytest.mark.parametrize(
        "name", [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
    )


NAMES = ("scan", "convolution", "update", "final state", "initial cotangent", "heads", "token of heads")


def number(outputs: tuple[Any, ...]) -> jax.Array:
    return sum(jnp.sum(jnp.sin(output)) for output in outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An op with arguments; the letters B, E and H in `letters` are what devices may share out."""

    function: Callable[..., Any]
    arrays: dict[str, jax.Array]
    fixed: dict[str, jax.Array]
    static: dict[str, Any]

    @property
    def letters(self) -> dict[str, str]:
        """Letters of the dimensions of every array."""
        table = TABLES[self.function.__name__]
        return {name: table.letters(name, array) for name, array in (self.arrays | self.fixed).items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Letters of the dimensions of every output."""
        return tuple(TABLES[self.function.__name__].outputs.values())

    def run(self, arrays: dict[str, Any], fixed: dict[str, Any], implementation: str | None = None) -> tuple[Any, ...]:
        """The outputs."""
        output = self.function(**arrays, **fixed, **self.static, implementation=implementation)
        return tuple(jax.tree.leaves(output))

    def loss(self, arrays: dict[str, Any], fixed: dict[str, Any], implementation: str | None = None) -> jax.Array:
        """A number that depends on every output."""
        return number(self.run(arrays, fixed, implementation))


def _cases() -> dict[str, Case]:
    scan, conv, heads = make_call(SCAN), make_call(CONV), make_call(HEADS)
    softplus = {"dt_softplus": True}

    def some(*names: str, **others: jax.Array) -> dict[str, jax.Array]:
        return {name: scan.arrays[name] for name in names} | others

    token = {name: array[:, 0] for name, array in some("x", "dt", "z", "B").items()}
    update = some("A", "D", "dt_bias", state=scan.arrays["initial_state"], C=scan.arrays["C"][:, :1]) | token
    of_heads = {name: heads.arrays[name] for name in ("A", "D", "dt_bias")}
    of_heads |= {name: heads.arrays[name][:, 0] for name in ("x", "dt", "B", "C")}
    of_heads["state"] = heads.arrays["initial_state"]
    ids = {"segment_ids": scan.integers["segment_ids"]}
    entering = some("x", "dt", "A", "B", "dt_bias")
    leaving = some("dt", "A", "C", "z", "dt_bias", dy=scan.arrays["x"])
    return {
        "scan": Case(function=selective_scan, arrays=scan.arrays, fixed=ids, static=softplus),
        "convolution": Case(
            function=causal_conv1d, arrays=conv.arrays, fixed=conv.integers, static={"activation": "silu"}
        ),
        "update": Case(function=selective_state_update, arrays=update, fixed={}, static=softplus),
        "final state": Case(function=selective_scan_final_state, arrays=entering, fixed=ids, static=softplus),
        "initial cotangent": Case(
            function=selective_scan_initial_cotangent, arrays=leaving, fixed=ids, static=softplus
        ),
        "heads": Case(function=ssd, arrays=heads.arrays, fixed=heads.integers, static=softplus),
        "token of heads": Case(function=ssd_state_update, arrays=of_heads, fixed={}, static=softplus),
    }


CASES = _cases()


def assert_close(actual: Any, expected: Any) -> None:
    for (path, value), reference in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, reference, **CLOSE, err_msg=jax.tree_util.keystr(path))


def outputs_and_gradients(run: Callable[..., tuple[Any, ...]], case: Case, arrays: Any) -> tuple[Any, Any]:
    """Of the case's arguments, with every gradient of `number`."""

    def loss(arrays: Any, fixed: Any) -> Any:
        outputs = run(arrays, fixed)
        return number(outputs), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(arrays, case.fixed)
    return outputs, gradients


@functools.cache
def unsharded(name: str) -> Any:
    """What one device gives."""
    case = CASES[name]
    return outputs_and_gradients(case.run, case, case.arrays)


def skip_off_platform(implementation: str) -> None:
    if implementation == "pallas_tpu" and ON_GPU:
        pytest.skip("for TPUs")


def tangents_of(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(5)

    def draw(array: jax.Array) -> jax.Array:
        values = rng.standard_normal(array.shape)
        values = values + 1j * rng.standard_normal(array.shape) if jnp.iscomplexobj(array) else values
        return jnp.asarray(values, array.dtype)

    return jax.tree.map(draw, arrays)


BARE = ScanSpec(name="bare", length=5, has_skip=False, has_gate=False, has_bias=False, has_initial_state=False)
COMPLEX = ScanSpec(
    name="complex", length=17, is_complex=True, has_complex_matrices=True, C="constant", discretization="zoh"
)


@pytest.mark.parametrize(
    ("function", "spec", "implementation"),
    [
        (selective_scan, SCAN, "xla"),
        (selective_scan, BARE, "xla_associative"),
        (selective_scan, COMPLEX, "xla"),
        (ssd, HEADS, "xla"),
    ],
    ids=["scan", "bare", "complex", "heads"],
)
def test_forward_mode(function: Callable[..., Any], spec: ScanSpec | SSDSpec, implementation: str) -> None:
    """By every argument at once, against the reference, which JAX differentiates by itself."""
    call = make_call(spec)
    tangents = tangents_of(call.arrays)

    @functools.partial(jax.jit, static_argnums=0)
    def run(name: str) -> Any:
        def op(arrays: dict[str, jax.Array]) -> Any:
            return function(**arrays, **call.integers, **call.static, implementation=name)

        return jax.jvp(op, (call.arrays,), (tangents,))

    assert_close(run(implementation), run("reference"))


def test_forward_mode_by_some_arguments() -> None:
    """`jacfwd` maps over tangents; `linearize` hands out a function that may be transposed."""
    case = CASES["scan"]

    @functools.partial(jax.jit, static_argnums=0)
    def run(name: str | None) -> Any:
        def by_rates(A: jax.Array) -> Any:
            return case.run(case.arrays | {"A": A}, case.fixed, name)

        outputs, linear = jax.linearize(by_rates, case.arrays["A"])
        transposed = jax.linear_transpose(linear, case.arrays["A"])(outputs)
        return jax.jacfwd(by_rates)(case.arrays["A"])[1], linear(case.arrays["A"]), transposed

    assert_close(run(None), run("reference"))


@functools.cache
def hessian_product(name: str) -> Any:
    """Of the Hessian of the scan's loss, by all arguments together: the derivative of the gradient in a direction."""
    case = CASES["scan"]
    gradient = functools.partial(jax.grad(case.loss), fixed=case.fixed, implementation=name)
    return jax.jit(lambda arrays: jax.jvp(gradient, (arrays,), (tangents_of(arrays),))[1])(case.arrays)


@pytest.mark.slow
def test_second_derivatives_of_the_scan() -> None:
    assert_close(hessian_product("xla"), hessian_product("reference"))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reverse over forward", "reverse over reverse"])
def test_second_derivatives_in_any_order(order: str) -> None:
    case = CASES["scan"]
    tangents = tangents_of(case.arrays)

    def slope(arrays: Any) -> jax.Array:
        loss = functools.partial(case.loss, fixed=case.fixed, implementation="xla")
        if order == "reverse over forward":
            return jax.jvp(loss, (arrays,), (tangents,))[1]
        pairs = zip(jax.tree.leaves(jax.grad(loss)(arrays)), jax.tree.leaves(tangents), strict=True)
        return sum(jnp.vdot(one, other) for one, other in pairs)

    assert_close(jax.jit(jax.grad(slope))(case.arrays), hessian_product("reference"))


KERNELS = [
    (selective_scan, "scan", "pallas_tpu"),
    (causal_conv1d, "convolution", "pallas_tpu"),
    pytest.param(selective_scan, "scan", "pallas_gpu", marks=pytest.mark.slow),
    pytest.param(causal_conv1d, "convolution", "pallas_gpu", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("function", "name", "implementation"), KERNELS)
def test_kernels_refuse_forward_mode_in_one_line(function, name: str, implementation: str) -> None:
    skip_off_platform(implementation)
    case = CASES[name]

    def run(x: jax.Array) -> Any:
        return case.run(case.arrays | {"x": x}, case.fixed, implementation)

    x = case.arrays["x"]
    message = f"{function.__name__}: '{implementation}' has no forward-mode derivative .* use implementation='xla'"
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(jax.jacfwd(run)).lower(x)
    # Only evaluating a tangent is refused; the backward pass of a mapped kernel is not.
    mapped = jax.vmap(lambda x: case.loss(case.arrays | {"x": x}, case.fixed, implementation))
    gradient = jax.eval_shape(jax.grad(lambda x: jnp.sum(mapped(x))), jnp.stack([x, x]))
    assert gradient.shape == (2, *x.shape)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_of_edge_states_refuse_derivatives(implementation: str) -> None:
    skip_off_platform(implementation)
    case = CASES["final state"]
    with pytest.raises(NotImplementedError, match=f"'{implementation}' has no derivative; use implementation='xla'"):
        jax.eval_shape(jax.grad(functools.partial(case.loss, implementation=implementation)), case.arrays, case.fixed)


@with_ops("scan")
def test_mapped_over_an_axis(name: str) -> None:
    """A gradient through two mapped calls is twice that of one, by what is mapped and by what the calls share."""
    case = CASES[name]
    first = "dy" if "dy" in case.arrays else "x"

    def loss(arrays: Any) -> jax.Array:
        stacked = jnp.stack([arrays[first]] * 2, axis=1)
        mapped = jax.vmap(lambda input_: case.loss(arrays | {first: input_}, case.fixed), in_axes=1)
        return jnp.sum(mapped(stacked)) / 2

    assert_close(jax.jit(jax.grad(loss))(case.arrays), unsharded(name)[1])


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

    def layer(arrays: dict[str, jax.Array]) -> jax.Array:
        y = selective_scan(**arrays, dt_softplus=True).y
        return causal_conv1d(y, jnp.ones((4, y.shape[2]))).y

    run = layer if kind == AxisType.Explicit else jax.shard_map(layer, in_specs=(specs,), out_specs=specs["x"])
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda arrays: number((run(arrays).astype(jnp.float32),))))
        text = gradient.lower(shapes).compile().as_text()
    instructions = [line for line, _ in compiled_instructions(text)]
    assert sum("tpu_custom_call" in line for line in instructions) == 4
    assert any(" all-reduce(" in line for line in instructions)
    assert not any(" all-gather" in line for line in instructions)


@with_ops("scan")
def test_exports_for_any_batch_and_length(name: str) -> None:
    case = CASES[name]
    rows, length = export.symbolic_shape("rows, length")
    symbols = {"B": rows, "L": length}
    given = case.arrays, case.fixed

    def symbolic(name: str, array: jax.Array) -> jax.ShapeDtypeStruct:
        shape = [symbols.get(letter, size) for letter, size in zip(case.letters[name], array.shape, strict=True)]
        return jax.ShapeDtypeStruct(shape, array.dtype)

    shapes = [{name: symbolic(name, array) for name, array in arrays.items()} for arrays in given]
    exported = export.export(jax.jit(jax.grad(case.loss)))(*shapes)

    def part(name: str, array: jax.Array) -> jax.Array:
        return array[tuple(slice({"B": 3, "L": 7}.get(letter)) for letter in case.letters[name])]

    parts = [{name: part(name, array) for name, array in arrays.items()} for arrays in given]
    assert_close(exported.call(*given), unsharded(name)[1])
    assert_close(exported.call(*parts), jax.jit(jax.grad(case.loss))(*parts))


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("name", ["scan", "convolution"])
def test_kernels_decline_sizes_that_are_symbols(name: str, implementation: str) -> None:
    skip_off_platform(implementation)
    case = CASES[name]
    (length,) = export.symbolic_shape("length")
    given = case.arrays | case.fixed
    shapes = {
        name: jax.ShapeDtypeStruct(
            [length if letter == "L" else size for letter, size in zip(case.letters[name], array.shape, strict=True)],
            array.dtype,
        )
        for name, array in given.items()
    }
    with pytest.raises(NotImplementedError, match=f"'{implementation}' takes known sizes only, got .*length"):
        export.export(jax.jit(lambda arrays: case.run(arrays, {}, implementation)))(shapes)


@with_ops("scan", "update")
def test_numpy_arrays_and_lists_are_arrays(name: str) -> None:
    case = CASES[name]

    def convert(index: int, array: jax.Array) -> Any:
        return np.asarray(array) if index % 2 else array.tolist()

    given = [
        {name: convert(index, array) for index, (name, array) in enumerate(arrays.items())}
        for arrays in (case.arrays, case.fixed)
    ]
    assert_close(jax.jit(lambda: case.run(*given))(), unsharded(name)[0])
