"""How arrays are placed inside a jitted function: constraints on activations, and calls on each device's own part."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from mamba_jax.sharding.axes import RULES, Axis, Logical, ShardingRules
from pallas_kernels.common.array_types import Size


def constrain(x: jax.Array, *axes: Logical) -> jax.Array:
    """Constrains an activation to the layout that `RULES` give it on the mesh of `jax.set_mesh`.

    Without a mesh, or on one whose axes the rules do not use, `x` is returned unchanged. A dimension that does not
    divide evenly, such as a length of one token, is not split.

    Args:
        x: the activation.
        *axes: what each dimension means, see `Logical`.
    """
    mesh, rules = _current()
    if rules is None:
        return x
    even = [None if dim % rules.parts(mesh, axis) else axis for dim, axis in zip(x.shape, axes, strict=True)]
    return jax.lax.with_sharding_constraint(x, rules.spec(even))


def in_context(array: jax.Array) -> jax.Array:
    """The array, replicated on the mesh of `jax.set_mesh` if its type names another mesh and one has explicit axes.

    JAX refuses to combine arrays of different explicit meshes, such as parameters made outside of the caller's mesh.
    """
    mesh, named = jax.sharding.get_abstract_mesh(), jax.typeof(array).sharding.mesh
    if mesh == named or mesh.empty or not (mesh.explicit_axes or named.explicit_axes):
        return array
    return jax.reshard(array, PartitionSpec())


def product(x: jax.Array, kernel: jax.Array, *, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The matrix product x W, summed over the last dimension of x and the first of W, as `dtype` or as x and W are.

    Under explicit mesh axes JAX asks how the result is split: in its leading dimensions like x, in its output
    dimensions like W, except over mesh axes that x uses already.
    """
    x_spec, kernel_spec = (tuple(jax.typeof(array).sharding.spec) for array in (x, kernel))
    if not any((*x_spec, *kernel_spec)):
        return jnp.tensordot(x, kernel, axes=1, preferred_element_type=dtype)
    taken = {name for part in x_spec if part is not None for name in (part if isinstance(part, tuple) else (part,))}
    outputs = [
        None if part is None or taken & set(part if isinstance(part, tuple) else (part,)) else part
        for part in kernel_spec[1:]
    ]
    kernel = jax.reshard(kernel, PartitionSpec(x_spec[-1], *outputs))
    out_sharding = PartitionSpec(*x_spec[:-1], *outputs)
    return jnp.tensordot(x, kernel, axes=1, preferred_element_type=dtype, out_sharding=out_sharding)


def product_of_groups(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product x W of each group with its W, (..., H, I) by (H, I, *O), as (..., H, *O) in float32 (or float64).

    Under explicit mesh axes the result is split like x in all but its last dimensions, over which it is whole.
    """
    lead, outputs = "abcdef"[: x.ndim - 2], "uvwxyz"[: kernel.ndim - 2]
    equation, dtype = f"{lead}hi,hi{outputs}->{lead}h{outputs}", jnp.promote_types(x.dtype, jnp.float32)
    if not jax.typeof(x).sharding.mesh.explicit_axes:
        return jnp.einsum(equation, x, kernel, preferred_element_type=dtype)
    *split, _ = jax.typeof(x).sharding.spec
    whole_outputs = [None] * len(outputs)
    kernel = jax.reshard(kernel, PartitionSpec(split[-1], None, *whole_outputs))
    return jnp.einsum(
        equation, x, kernel, preferred_element_type=dtype, out_sharding=PartitionSpec(*split, *whole_outputs)
    )


def placed_like(x: jax.Array, leader: jax.Array) -> jax.Array:
    """An array that is to be added to another one of as many dimensions, split like that one by explicit mesh axes."""
    kind = jax.typeof(leader).sharding
    if not kind.mesh.explicit_axes:
        return x
    return jax.reshard(
        x, PartitionSpec(*(None if dim == 1 else part for dim, part in zip(x.shape, kind.spec, strict=True)))
    )


def whole(x: jax.Array, dim: int) -> jax.Array:
    """The array, gathered along a dimension that explicit mesh axes split."""
    kind = jax.typeof(x).sharding
    if kind.spec[dim] is None:
        return x
    return jax.reshard(x, PartitionSpec(*(None if at == dim else part for at, part in enumerate(kind.spec))))


def in_groups(x: jax.Array, size: int) -> jax.Array:
    """(..., E) as (..., E / size, size). A dimension whose groups explicit mesh axes would cut is gathered first."""
    kind = jax.typeof(x).sharding
    axes = kind.spec[-1]
    names = axes if isinstance(axes, tuple) else (axes,) * (axes is not None)
    if x.shape[-1] // size % math.prod(kind.mesh.shape[name] for name in names):
        x = whole(x, x.ndim - 1)
    return x.reshape(*x.shape[:-1], -1, size)


def sharding_of_rows(indices: jax.Array) -> PartitionSpec | None:
    """The partition of `table[indices]` under explicit mesh axes: split like `indices`; None without such axes."""
    kind = jax.typeof(indices).sharding
    return PartitionSpec(*kind.spec, None) if kind.mesh.explicit_axes else None


def _current() -> tuple[AbstractMesh, ShardingRules | None]:
    """The mesh of `jax.set_mesh` and the rules restricted to it; None for the rules if they would split nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    rules = RULES.within(mesh)
    return mesh, rules if any(dataclasses.astuple(rules)) else None


def per_shard[*Outputs](
    function: Callable[..., tuple[*Outputs]],
    arrays: Mapping[str, jax.Array | None],
    axes: Mapping[str, Sequence[Logical]],
    out_axes: Sequence[Sequence[Logical]],
) -> tuple[*Outputs]:
    """Runs an operation on each device with that device's part of the arguments, under the mesh of `jax.set_mesh`.

    Meant for operations that compute each batch row and each channel independently (with the help of
    `mamba_jax.models.sequence_parallel`, parts of the length too). XLA's partitioner cannot see this independence
    through a loop or a kernel and would gather the whole batch on every device. The gradient of an argument that
    several devices share is summed over them. An axis that does not divide evenly, such as the batch of a single
    prompt, is not split: every device computes all of it.

    Args:
        function: the operation; called with keyword arguments, returns a tuple of arrays.
        arrays: its arguments by name; an argument that is None is passed on as None.
        axes: logical axes of every argument that is not None.
        out_axes: logical axes of every output.

    Returns:
        The outputs for the whole arrays.
    """
    mesh, rules = _current()
    if rules is None:
        return function(**arrays)
    present = {name: array for name, array in arrays.items() if array is not None}
    absent = dict.fromkeys(arrays.keys() - present.keys())
    uneven = {
        axis
        for name, array in present.items()
        for dim, axis in zip(array.shape, axes[name], strict=True)
        if dim % rules.parts(mesh, axis)
    }

    def spec(axes: Sequence[Logical]) -> PartitionSpec:
        return rules.spec([None if axis in uneven else axis for axis in axes])

    mapped = jax.shard_map(
        lambda shards: function(**shards, **absent),
        in_specs=({name: spec(axes[name]) for name in present},),
        out_specs=tuple(spec(output) for output in out_axes),
        axis_names=set(mesh.auto_axes),
        # Nothing here needs the check under a mesh of our own. Inside a caller's `jax.shard_map` it must stay on: it
        # computes which manual axes the results vary over, which the caller's code relies on.
        check_vma=bool(mesh.manual_axes),
    )
    # Outside of jit, `shard_map` only accepts all axes of a mesh; here explicit axes are left out.
    return (jax.jit(mapped) if mesh.explicit_axes else mapped)(present)


def on_own_tokens(
    function: Callable[..., jax.Array], tokens: Mapping[str, jax.Array], whole: Mapping[str, jax.Array]
) -> jax.Array:
    """Calls a function that works on every token alone, where explicit mesh axes say how tokens are split.

    Without such axes the function is called as it is, and may call `per_shard` itself.

    Args:
        function: called with keyword arguments; its result is (B, L, ...), one for each token.
        tokens: arguments (B, L, ...), all split as the first one is in these two dimensions.
        whole: arguments that every device needs whole.
    """
    mesh = jax.typeof(next(iter(tokens.values()))).sharding.mesh
    if not mesh.explicit_axes:
        return function(**tokens, **whole)
    split = PartitionSpec(*jax.typeof(next(iter(tokens.values()))).sharding.spec[:2])
    specs = dict.fromkeys(tokens, split) | dict.fromkeys(whole, PartitionSpec())
    there = {name: jax.reshard(array, specs[name]) for name, array in {**tokens, **whole}.items()}
    mapped = jax.shard_map(
        lambda arrays: function(**arrays), in_specs=(specs,), out_specs=split, axis_names=set(mesh.explicit_axes)
    )
    # Outside of jit JAX maps over all axes of a mesh only.
    return (jax.jit(mapped) if mesh.auto_axes else mapped)(there)


def is_split() -> bool:
    """Whether the mesh of the context splits any array."""
    return _current()[1] is not None


def parts(axis: Axis, size: Size) -> int:
    """Number of parts into which `per_shard` splits a dimension with this axis and size; 1 without a mesh."""
    mesh, rules = _current()
    count = 1 if rules is None else rules.parts(mesh, axis)
    return 1 if size % count else count


def shard_number(axis: Axis) -> jax.Array:
    """Inside `per_shard`: which part of the dimensions with this axis the device works on, counted from 0."""
    return jax.lax.axis_index(RULES.mesh_axes(axis))


def shard_count(axis: Axis) -> int:
    """Inside `per_shard`: number of parts that the dimensions with this axis are split into."""
    return jax.lax.axis_size(RULES.mesh_axes(axis))


def gathered[T](tree: T, axis: Axis, *, dim: int = 0) -> T:
    """Inside `per_shard`: the arrays of all devices along `axis`, one after the other along the dimension `dim`."""
    names = RULES.mesh_axes(axis)
    return jax.tree.map(lambda array: jax.lax.all_gather(array, names, axis=dim, tiled=True), tree)


def summed[T](tree: T, axis: Axis) -> T:
    """Inside `per_shard`: the sum of the arrays of all devices along `axis`, on each of them."""
    return jax.lax.psum(tree, RULES.mesh_axes(axis))


def scattered_sum[T](tree: T, axis: Axis) -> T:
    """Inside `per_shard`: the sum of the arrays along `axis`, of which each device has its part of the first dimension.

    It undoes `gathered`: what devices computed from all rows goes back to the device that gave them.
    """
    mesh_axes = RULES.mesh_axes(axis)
    return jax.tree.map(lambda array: jax.lax.psum_scatter(array, mesh_axes, tiled=True), tree)


def from_shard[T](tree: T, axis: Axis, *, before: int) -> T:
    """Inside `per_shard`: the arrays of the shard that is `before` shards earlier; zeros if no such shard exists.

    Args:
        tree: arrays of this device; every device passes the same structure and shapes.
        axis: the logical axis along which shards are counted.
        before: how many shards earlier; negative for a later shard.
    """
    count = shard_count(axis)
    steps = [(source, source + before) for source in range(count) if 0 <= source + before < count]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, RULES.mesh_axes(axis), steps), tree)


def from_last[T](tree: T, axis: Axis) -> T:
    """Inside `per_shard`: the arrays of the last shard along `axis`, given to all shards."""
    is_last = shard_number(axis) == shard_count(axis) - 1
    return jax.tree.map(
        lambda array: jax.lax.psum(jnp.where(is_last, array, jnp.zeros_like(array)), RULES.mesh_axes(axis)), tree
    )
