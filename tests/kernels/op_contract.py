"""The contract of every implementation of every op: checks against the float64 reference.

A check takes an op, an implementation's name and a specification, and raises AssertionError. A new implementation is
held to the contract by adding its name to the list of its op's test module.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import TABLES
from pallas_kernels.common.arg_spec import Arguments, allowed_error, evaluate
from pallas_kernels.manifests import MANIFESTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """What the contract needs to know about an op.

    Attributes:
        name: as in lowered modules, in `pallas_kernels.TABLES`, which says what it takes and returns, and in
            `pallas_kernels.manifests.MANIFESTS`, which says how accurate it has to be.
        function: the public function.
    """

    name: str
    function: Callable[..., Any]

    @property
    def carry(self) -> tuple[str, str]:
        """Names of the argument that carries a past, and of the output that hands it on."""
        table = TABLES[self.name]
        names = [name.removeprefix("initial_") for name in table.arguments if name.startswith("initial_")]
        return next((f"initial_{name}", f"final_{name}") for name in names if f"final_{name}" in table.outputs)

    def is_sequence(self, name: str, array: Any) -> bool:
        """Whether an argument has a time axis, which is then its second."""
        return "L" in TABLES[self.name].letters(name, array)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Concrete arguments of a call by name: what has a gradient, integers, static options; compared by identity."""

    arrays: dict[str, Any]
    integers: dict[str, Any]
    static: dict[str, Any]


@functools.cache
def make_call(spec) -> Call:
    """The arguments of a specification in the dtypes under test; the same object for the same specification."""
    arguments: Arguments = spec.arguments()
    arrays = {name: jnp.asarray(array) for name, array in arguments.rounded(spec.dtype).items()}
    integers = {name: jnp.asarray(array) for name, array in arguments.integers.items()}
    return Call(arrays=arrays, integers=integers, static=dict(arguments.static))


def _single(array: np.ndarray) -> type:
    return np.complex64 if np.iscomplexobj(array) else np.float32


def _to_numpy(tree):
    """Leaves in double precision by name: those of a dict, or the fields of an op's output."""
    items = tree.items() if isinstance(tree, dict) else vars(tree).items()
    return {
        name: np.asarray(value).astype(np.complex128 if jnp.iscomplexobj(value) else np.float64)
        for name, value in items
    }


def with_arrays(call: Call, **arrays: np.ndarray) -> Call:
    """The call with some arguments replaced, in float32."""
    return dataclasses.replace(call, arrays=call.arrays | {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()})


def compiled(op: Op, call: Call, implementation: str):
    """A jitted function of (arrays, cotangents) that returns outputs and the gradients of every array."""

    def outputs_and_gradients(arrays, cotangents):
        run = functools.partial(op.function, **call.integers, **call.static, implementation=implementation)
        outputs, vjp = jax.vjp(lambda arrays: run(**arrays), arrays)
        return outputs, vjp(cotangents)[0]

    return jax.jit(outputs_and_gradients)


@functools.cache
def cotangents_of(op: Op, call: Call):
    """Random cotangents of every output, in the outputs' dtypes."""
    run = functools.partial(op.function, **call.integers, **call.static, implementation="reference")
    rng = np.random.default_rng(1)

    def draw(output):
        values = rng.standard_normal(output.shape)
        if jnp.issubdtype(output.dtype, jnp.complexfloating):
            values = values + 1j * rng.standard_normal(output.shape)
        return jnp.asarray(values.astype(_single(values)).astype(output.dtype))

    return jax.tree.map(draw, jax.eval_shape(lambda arrays: run(**arrays), call.arrays))


@functools.cache
def in_double_precision(op: Op, call: Call) -> tuple[dict, dict]:
    """Outputs and gradients of the reference, in float64, for the very same arguments and cotangents."""
    cotangents = cotangents_of(op, call)
    with jax.enable_x64(True):

        def widen(array):
            dtype = jnp.complex128 if jnp.iscomplexobj(array) else jnp.float64
            return jnp.asarray(np.asarray(array).astype(dtype))

        wide = Call(jax.tree.map(widen, call.arrays), call.integers, call.static)
        outputs, gradients = compiled(op, wide, "reference")(wide.arrays, jax.tree.map(widen, cotangents))
        assert all(leaf.dtype in (np.float64, np.complex128) for leaf in jax.tree.leaves((outputs, gradients)))
        return _to_numpy(outputs), _to_numpy(gradients)


def assert_close(actual: dict, expected: dict, dtypes: dict, *, terms: int, context: str) -> None:
    """Compares named arrays at the tolerance that their dtypes and the longest sum of `terms` terms imply."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert np.all(np.isfinite(value)), f"{context}: {name} is not finite"
        scale = np.max(np.abs(expected[name]), initial=0)
        allowed = allowed_error(expected[name], dtypes[name], terms=terms)
        excess = np.max(np.abs(value - expected[name]) - allowed, initial=-np.inf)
        worst = np.max(np.abs(value - expected[name]), initial=0)
        assert excess <= 0, f"{context}: {name} is off by {worst:.3e} of {scale:.3e}, {excess:.3e} more than allowed"


def _assert_equals_reference(op: Op, call: Call, outputs, gradients: dict, context: str) -> None:
    expected_outputs, expected_gradients = in_double_precision(op, call)
    terms = _terms(op, call)
    dtypes = {name: output.dtype for name, output in vars(outputs).items()}
    assert_close(_to_numpy(outputs), expected_outputs, dtypes, terms=terms, context=context)
    dtypes = {name: array.dtype for name, array in call.arrays.items()}
    assert dtypes == {name: gradient.dtype for name, gradient in gradients.items()}
    assert_close(_to_numpy(gradients), expected_gradients, dtypes, terms=terms, context=f"{context}, gradient")


def _terms(op: Op, call: Call) -> int:
    """Terms of the longest sum, as the op's manifest says."""
    return evaluate(MANIFESTS[op.name].tolerance.longest_sum, TABLES[op.name].sizes(call.arrays))


def check_values_and_gradients(op: Op, implementation: str, call: Call, *, relative: float | None = None) -> None:
    """Outputs and every gradient agree with the float64 reference; running twice gives the same bits.

    Args:
        op: the op.
        implementation: its name.
        call: the arguments.
        relative: limit of every error's root mean square over that of the exact result; None sets none.
    """
    cotangents = cotangents_of(op, call)
    run = compiled(op, call, implementation)
    outputs, gradients = run(call.arrays, cotangents)
    again = run(call.arrays, cotangents)
    for first, second in zip(jax.tree.leaves((outputs, gradients)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    _assert_equals_reference(op, call, outputs, gradients, f"{op.name}.{implementation}")
    if relative is None:
        return
    exact_outputs, exact_gradients = in_double_precision(op, call)
    for name, actual in (_to_numpy(outputs) | _to_numpy(gradients)).items():
        exact = (exact_outputs | exact_gradients)[name]
        error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
        assert error < relative, f"{op.name}.{implementation}: {name} is off by {error:.1e}"


def check_backend_is_visible(op: Op, implementation: str, call: Call) -> None:
    """The lowered module carries the name of the implementation that was asked for, and of no other."""
    run = functools.partial(op.function, **call.integers, **call.static, implementation=implementation)
    text = jax.jit(lambda arrays: run(**arrays)).lower(call.arrays).as_text(debug_info=True)
    assert f"{op.name}.{implementation}/" in text
    assert "reference/" not in text.replace(f"{op.name}.{implementation}/", "")


def _part(op: Op, call: Call, start: int, stop: int) -> Call:
    """Tokens start .. stop - 1 of a call."""

    def cut(name, array):
        return array[:, start:stop] if op.is_sequence(name, array) else array

    return Call(
        {name: cut(name, array) for name, array in call.arrays.items()},
        {name: cut(name, array) for name, array in call.integers.items()},
        call.static,
    )


def check_split(op: Op, implementation: str, call: Call, at: int) -> None:
    """Two calls that hand the carry on equal the reference's one call, in outputs and gradients."""
    carry_in, carry_out = op.carry
    length = call.arrays["x"].shape[1]

    def halves(arrays):
        full = dataclasses.replace(call, arrays=arrays)
        head, tail = _part(op, full, 0, at), _part(op, full, at, length)
        first = op.function(**head.arrays, **head.integers, **head.static, implementation=implementation)
        tail.arrays[carry_in] = getattr(first, carry_out)
        second = op.function(**tail.arrays, **tail.integers, **tail.static, implementation=implementation)
        return dataclasses.replace(second, y=jnp.concatenate([first.y, second.y], axis=1))

    @jax.jit
    def run(arrays, cotangents):
        outputs, vjp = jax.vjp(halves, arrays)
        return outputs, vjp(cotangents)[0]

    outputs, gradients = run(call.arrays, cotangents_of(op, call))
    _assert_equals_reference(op, call, outputs, gradients, f"{op.name}.{implementation} split at {at}")


def _only_y(op: Op, call: Call, start: int, stop: int):
    """The call's cotangents, zeroed but for y of the tokens start .. stop - 1."""
    cotangents = cotangents_of(op, call)
    zeros = jax.tree.map(jnp.zeros_like, cotangents)
    return dataclasses.replace(zeros, y=zeros.y.at[:, start:stop].set(cotangents.y[:, start:stop]))


def check_causality(op: Op, implementation: str, call: Call, at: int) -> None:
    """Outputs before `at` have exactly zero gradient by tokens from `at` on, and a non-zero one by those before."""
    _, gradients = compiled(op, call, implementation)(call.arrays, _only_y(op, call, 0, at))
    for name, gradient in gradients.items():
        if op.is_sequence(name, gradient):
            gradient = np.asarray(gradient)
            assert not gradient[:, at:].any(), f"{op.name}.{implementation}: {name} sees the future"
            assert gradient[:, :at].any(), f"{op.name}.{implementation}: {name} has no gradient"


def check_segments(op: Op, implementation: str, call: Call, starts: tuple[int, ...]) -> None:
    """A packed sequence equals its documents run alone, and no gradient crosses a boundary.

    The call has no segments; the check packs documents that start at 0 and at `starts`.
    """
    carry_in, carry_out = op.carry
    batch, length = call.arrays["x"].shape[:2]
    document_L = np.searchsorted(starts, np.arange(length), side="right").astype(np.int32)
    packed = dataclasses.replace(call, integers={"segment_ids": jnp.asarray(np.tile(document_L, (batch, 1)))})
    run = compiled(op, packed, implementation)
    context = f"{op.name}.{implementation}"

    y, carry, outputs = [], None, None
    for first, stop in zip((0, *starts), (*starts, length), strict=True):
        outputs, gradients = run(packed.arrays, _only_y(op, packed, first, stop))
        for name, gradient in gradients.items():
            if op.is_sequence(name, gradient):
                outside = np.delete(np.asarray(gradient), np.s_[first:stop], axis=1)
                assert not outside.any(), f"{context}: gradient of {name} leaks out of document {first}:{stop}"
        assert np.asarray(gradients[carry_in]).any() == (first == 0), f"{context}: {carry_in} leaks"
        alone = _part(op, call, first, stop)
        if first > 0:
            del alone.arrays[carry_in]
        function = functools.partial(op.function, **alone.static, implementation=implementation)
        document = jax.jit(lambda arrays, function=function: function(**arrays))(alone.arrays)
        y.append(np.asarray(document.y))
        carry = np.asarray(getattr(document, carry_out))

    expected = {"y": np.concatenate(y, axis=1), carry_out: carry}
    dtypes = dict.fromkeys(expected, jnp.dtype(jnp.float32))
    assert_close(_to_numpy(outputs), expected, dtypes, terms=_terms(op, call), context=f"{context} packed")
