"""Operations on arrays whose types say how they lie on devices: inside `jax.shard_map`, or under explicit mesh axes.

An operation names the dimensions of its arrays by letters. It treats batch rows (B) and channels (E), or heads (H),
apart, so a device can work on its own rows and channels alone; groups (G) lie with their channels or heads, all else is
needed whole.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.common.arguments import Arguments, fields_of, members_of_groups


def on_own_part[Output](function: Callable[[Any], Output], arguments: Arguments, returns: type[Output]) -> Output:
    """Calls an op on each device with the batch rows, and the channels or heads, that the device holds.

    Under explicit mesh axes, rows and channels or heads stay split as those of the first array are, and the other
    arrays are laid out to match. Without such axes, `function` is called as it is.

    Args:
        function: computes the op's result from its arguments.
        arguments: the op's arguments, for all rows and channels or heads.
        returns: class of the op's result.
    """
    arrays, letters = arguments.arrays(), arguments.letters()
    mesh = next((m for m in (jax.typeof(array).sharding.mesh for array in arrays.values()) if m.explicit_axes), None)

    def run(parts: dict[str, jax.Array]) -> Output:
        return function(dataclasses.replace(arguments, **alike_over_devices(parts)))

    if mesh is None:
        return run(arrays)
    leading = next(iter(arrays))
    axes = dict(zip(letters[leading], jax.typeof(arrays[leading]).sharding.spec, strict=True))
    members = members_of_groups(axes)
    axes = _of_groups({letter: axes[letter] for letter in ("B", members)}, mesh, arrays, letters)
    specs = {name: _spec(letters[name], axes) for name in arrays}
    there = {name: jax.reshard(array, NamedSharding(mesh, specs[name])) for name, array in arrays.items()}
    out_specs = returns(
        **{name: _spec(field.metadata["letters"][0], axes) for name, field in fields_of(returns).items()}
    )
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=out_specs, axis_names=set(mesh.explicit_axes))
    # Outside of jit JAX maps over all axes of a mesh only.
    return (jax.jit(mapped) if mesh.auto_axes else mapped)(there)


def _spec(letters: str, axes: Mapping[str, Any]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(letter) for letter in letters))


def _of_groups(
    axes: dict[str, Any], mesh: Any, arrays: dict[str, jax.Array], letters: Mapping[str, str]
) -> dict[str, Any]:
    """Adds the mesh axes of groups, those of their members; members stay whole where groups would not."""
    members = members_of_groups(axes)
    split = axes[members]
    names = split if isinstance(split, tuple) else (split,) * (split is not None)
    parts = math.prod(mesh.shape[name] for name in names)
    counts = [arrays[name].shape[letters[name].index("G")] for name in arrays if "G" in letters[name]]
    if any(count % parts for count in counts):
        return axes | {members: None}
    return axes | {"G": split}


def alike_over_devices(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays, each varying over all mesh axes that any of them varies over inside a `jax.shard_map`.

    What is computed from some of them then has the type of what is computed from others, and the gradient of one that
    devices share is summed over them.
    """
    over = frozenset[str]().union(*map(_varying, arrays.values()))
    return {name: _varied(array, over) for name, array in arrays.items()}


def varying_like(array: jax.Array, results: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Results of a kernel whose types do not say that they vary over mesh axes, as its argument `array` does."""
    return {name: _varied(result, _varying(array)) for name, result in results.items()}


def result_type(array: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over the mesh axes that its argument `array` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def _varying(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def _varied(array: jax.Array, over: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(over - _varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
