"""Functions whose derivatives are written by hand in both directions.

`jax.custom_vjp` takes a backward pass and then refuses forward mode; `jax.custom_jvp` takes a forward derivative and
makes the backward pass by transposing it. `differentiable` takes both: a `jax.custom_jvp` whose tangents come out of
one primitive, a linear map that brings its own transpose. Evaluated it is the forward derivative; transposed it is the
backward pass, from what the forward pass has kept. JAX differentiates both in turn, which gives second derivatives.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from pallas_kernels.common.arguments import Arguments

_Flat = Sequence[jax.Array]


def differentiable(
    function: Callable[..., Any],
    *,
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., Any],
    tangent: Callable[..., Any],
) -> Callable[..., Any]:
    """Gives a function of (static, operands, fixed) the derivatives by its operands that are written by hand.

    `static` is hashable, `operands` a tree of floating arrays, and `fixed` a tree of arrays without a derivative.

    Args:
        function: (static, operands, fixed) to a tree of outputs.
        forward: (static, operands, fixed) to the same outputs, and the residuals that the derivatives start from.
        backward: (static, residuals, cotangents of the outputs) to cotangents of the operands.
        tangent: (static, residuals, tangents of the operands) to tangents of the outputs; the tangent is None for an
            operand that nobody differentiates by.
    """
    derived = jax.custom_jvp(function, nondiff_argnums=(0,))

    def rule(static: Hashable, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
        outputs, residuals = forward(static, *primals)
        flat_outputs, output_tree = jax.tree.flatten(outputs)
        flat_residuals, residual_tree = jax.tree.flatten(residuals)
        flat_tangents, operand_tree = jax.tree.flatten(tangents[0])
        is_moving = tuple(not isinstance(leaf, SymbolicZero) for leaf in flat_tangents)

        def apply(residuals: _Flat, moving: _Flat) -> _Flat:
            rest = iter(moving)
            tangents = operand_tree.unflatten([next(rest) if moves else None for moves in is_moving])
            return jax.tree.leaves(tangent(static, residual_tree.unflatten(residuals), tangents))

        def transpose(residuals: _Flat, cotangents: _Flat) -> _Flat:
            results = backward(static, residual_tree.unflatten(residuals), output_tree.unflatten(cotangents))
            leaves = operand_tree.flatten_up_to(results)
            return [leaf for leaf, moves in zip(leaves, is_moving, strict=True) if moves]

        flat_tangents = _linear_map_p.bind(
            *flat_residuals,
            *(leaf for leaf, moves in zip(flat_tangents, is_moving, strict=True) if moves),
            functions=_Functions(apply, transpose),
            num_residuals=len(flat_residuals),
            types=tuple(jax.typeof(output).to_tangent_aval() for output in flat_outputs),
        )
        return outputs, output_tree.unflatten(flat_tangents)

    derived.defjvp(rule, symbolic_zeros=True)
    return derived


def differentiable_op[Output](
    outputs: Callable[[Any, Any], Output],
    *,
    forward: Callable[[Any, Any], tuple[Output, Any]],
    backward: Callable[[Any, Any, Any, Output], dict[str, jax.Array]],
    tangent: Callable[..., Any] | None = None,
) -> Callable[[Any, Any], Output]:
    """An op as a function (static, arguments), with derivatives by the floating arrays of its arguments.

    Args:
        outputs: (static, arguments) to the op's result.
        forward: (static, arguments) to the same result, and what the backward pass starts from besides the arguments.
        backward: (static, arguments, what `forward` kept, cotangents of the result) to the gradients by name; they are
            rounded to the dtypes of the arguments here.
        tangent: forward derivative, see `differentiable`; by default JAX differentiates `outputs`. `no_forward_mode`
            where it cannot.
    """

    def joined(operands: Arguments, fixed: dict[str, jax.Array]) -> Arguments:
        return dataclasses.replace(operands, **fixed)

    def plain(static: Any, operands: Arguments, fixed: dict[str, jax.Array]) -> Output:
        return outputs(static, joined(operands, fixed))

    def with_residuals(static: Any, operands: Arguments, fixed: dict[str, jax.Array]) -> tuple[Output, Any]:
        # Rematerialisation policies know results of a forward pass by the name of the op.
        named = functools.partial(checkpoint_name, name=operands.op)
        result, kept = jax.tree.map(named, forward(static, joined(operands, fixed)))
        return result, (operands, fixed, kept)

    def gradients(static: Any, residuals: Any, cotangents: Output) -> Arguments:
        operands, fixed, kept = residuals
        found = backward(static, joined(operands, fixed), kept, cotangents)
        given = operands.arrays()
        return dataclasses.replace(operands, **{name: found[name].astype(given[name].dtype) for name in given})

    def output_tangents(static: Any, residuals: Any, tangents: Arguments) -> Any:
        """The default forward derivative: `outputs` is run again and differentiated by JAX.

        An operand without a tangent is None among `tangents`, and held fixed.
        """
        operands, fixed, _ = residuals
        moving = tangents.arrays()

        def run(moving: dict[str, jax.Array]) -> Any:
            return plain(static, dataclasses.replace(operands, **moving), fixed)

        primals = {name: getattr(operands, name) for name in moving}
        _, result = jax.jvp(run, (primals,), (moving,))
        return result

    derived = differentiable(plain, forward=with_residuals, backward=gradients, tangent=tangent or output_tangents)
    return lambda static, arguments: derived(static, *arguments.operands())


def no_forward_mode(op: str, implementation: str) -> Callable[..., Any]:
    """The `tangent` of a kernel that has none.

    Args:
        op: name of the op, for the message.
        implementation: that has no forward derivative.
    """

    def tangent(*_: Any) -> Any:
        raise NotImplementedError(
            f"{op}: {implementation!r} has no forward-mode derivative (jvp, jacfwd, linearize); use "
            "implementation='xla'"
        )

    return tangent


def not_differentiable(op: str, implementation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of trees of arrays that raises NotImplementedError, with what to use, where it is differentiated."""
    derived = jax.custom_jvp(function)

    @derived.defjvp
    def rule(*_: Any) -> Any:
        raise NotImplementedError(f"{op}: {implementation!r} has no derivative; use implementation='xla'")

    return derived


@dataclasses.dataclass(frozen=True)
class _Functions:
    """A linear map and its transpose, each of (residuals, arrays that it is linear in) in flat lists."""

    apply: Callable[[_Flat, _Flat], _Flat]
    transpose: Callable[[_Flat, _Flat], _Flat]

    def mapped(self, **options: Any) -> "_Functions":
        """Over a new leading axis of everything but some residuals; options of `jax.vmap`."""
        return _Functions(jax.vmap(self.apply, **options), jax.vmap(self.transpose, **options))


# Operands are the residuals, then the arrays that the map is linear in. `types` are those of its results.
_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True


@_linear_map_p.def_impl
def _evaluate(*arrays: jax.Array, functions: _Functions, num_residuals: int, types: tuple[Any, ...]) -> _Flat:
    del types
    return functions.apply(list(arrays[:num_residuals]), list(arrays[num_residuals:]))


@_linear_map_p.def_abstract_eval
def _types(*_: Any, types: tuple[Any, ...], **__: Any) -> tuple[Any, ...]:
    return types


mlir.register_lowering(_linear_map_p, mlir.lower_fun(_evaluate, multiple_results=True))


def _transpose(cotangents, *arrays, functions: _Functions, num_residuals: int, types: tuple[Any, ...]):
    """The rule of `_linear_map_p` for the backward pass: cotangents of its results to cotangents of its operands.

    Residuals get None, as the map is not linear in them; so do inputs whose value is known.
    """
    del types
    residuals, inputs = list(arrays[:num_residuals]), arrays[num_residuals:]
    results = functions.transpose(residuals, [ad.instantiate_zeros(cotangent) for cotangent in cotangents])
    # An input that is known here is the zero tangent of another differentiation, see `_jvp`.
    wanted = [ad.is_undefined_primal(array) for array in inputs]
    return [None] * num_residuals + [
        result if is_wanted else None for result, is_wanted in zip(results, wanted, strict=True)
    ]


def _jvp(primals, tangents, *, functions: _Functions, num_residuals: int, types: tuple[Any, ...]):
    """The rule of `_linear_map_p` for its own derivative, which second derivatives need: results and their tangents.

    The map is linear in its inputs, so their tangents go through the map itself; residuals go through `jax.jvp` of it.
    """
    bind = functools.partial(_linear_map_p.bind, functions=functions, num_residuals=num_residuals, types=types)
    outputs = bind(*primals)
    sums = [ad.Zero(kind) for kind in types]
    linear = tangents[num_residuals:]
    if any(type(tangent) is not ad.Zero for tangent in linear):
        sums = bind(*primals[:num_residuals], *map(ad.instantiate_zeros, linear))
    moving = [index for index in range(num_residuals) if type(tangents[index]) is not ad.Zero]
    if moving:

        def by_residuals(*values: jax.Array) -> _Flat:
            residuals = list(primals[:num_residuals])
            for index, value in zip(moving, values, strict=True):
                residuals[index] = value
            return functions.apply(residuals, list(primals[num_residuals:]))

        _, others = jax.jvp(by_residuals, [primals[i] for i in moving], [tangents[i] for i in moving])
        sums = [ad.add_tangents(one, other) for one, other in zip(sums, others, strict=True)]
    return outputs, sums


def _batch(axis_data, arrays, axes, *, functions: _Functions, num_residuals: int, types: tuple[Any, ...]):
    """The rule of `_linear_map_p` for `jax.vmap`: the same primitive, with both of its functions mapped.

    Mapped arrays get their new axis in front. Inputs without it are repeated along it, since each element has its own
    cotangent; residuals without it stay as they are. Returns the results and their axes.
    """
    if all(axis is None for axis in axes):
        results = _linear_map_p.bind(*arrays, functions=functions, num_residuals=num_residuals, types=types)
        return results, [None] * len(results)
    size, mesh_axis = axis_data.size, axis_data.explicit_mesh_axis

    def at_front(array, axis, *, is_linear: bool):
        if axis is not None:
            return jnp.moveaxis(array, axis, 0)
        return batching.broadcast(array, size, 0, mesh_axis) if is_linear else array

    arrays = [
        at_front(array, axis, is_linear=index >= num_residuals)
        for index, (array, axis) in enumerate(zip(arrays, axes, strict=True))
    ]
    residual_axes = [None if axis is None else 0 for axis in axes[:num_residuals]]
    results = _linear_map_p.bind(
        *arrays,
        functions=functions.mapped(
            in_axes=(residual_axes, 0),
            axis_size=size,
            axis_name=axis_data.name,
            spmd_axis_name=axis_data.spmd_name or mesh_axis,
        ),
        num_residuals=num_residuals,
        types=tuple(unmapped_aval(size, 0, kind, mesh_axis) for kind in types),
    )
    return results, [0] * len(results)


ad.primitive_transposes[_linear_map_p] = _transpose
ad.primitive_jvps[_linear_map_p] = _jvp
batching.fancy_primitive_batchers[_linear_map_p] = _batch
