"""The ops under JAX's transformations: forward mode, second derivatives, vmap, export, lists."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels import (
    causal_conv1d,
    selective_scan,
    ssd,
)
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.ssd.arg_specs import SSDSpec
from tests.kernels.cases import CASES, HEADS, SCAN, assert_close, skip_off_platform, unsharded, with_ops
from tests.kernels.op_contract import make_call


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
        def op(arrays: dict[str, Any]) -> Any:
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
        return jnp.asarray(sum(jnp.vdot(one, other) for one, other in pairs))

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

    first, second = (
        {name: convert(index, array) for index, (name, array) in enumerate(arrays.items())}
        for arrays in (case.arrays, case.fixed)
    )
    assert_close(jax.jit(lambda: case.run(first, second))(), unsharded(name)[0])
