"""Logical axes, the rules that map them to mesh axes, and the only sharding constraints of the library.

Every parameter carries the logical axes of its dimensions (`nnx.Param(value, axes=(Axis.EMBED, Axis.INNER))`), and
its optimizer moments inherit them. Activations are constrained with `constrain`. Nothing outside this module names a
mesh axis.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mamba_jax.errors import InputError
from mamba_jax.sharding.config import MeshConfig


class Axis(enum.StrEnum):
    """Logical meaning of an array dimension."""

    BATCH = "batch"
    LENGTH = "length"
    EMBED = "embed"
    INNER = "inner"
    HEADS = "heads"
    STATE = "state"
    CONV = "conv"
    DT_RANK = "dt_rank"
    VOCAB = "vocab"
    LAYERS = "layers"


# Meaning of a dimension: one axis, several whose parts one dimension enumerates, the first slowest, or none.
type Logical = Axis | tuple[Axis, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axes each logical axis is split over; an empty tuple replicates.

    A field for every `Axis`. EMBED speaks of parameters: the residual stream itself is split by BATCH and LENGTH only.
    Devices that work on parts of one sequence need the same parameters, as those with parts of the batch do, and share
    them out in the same way.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("sequence",)
    embed: tuple[str, ...] = ("fsdp", "sequence")
    inner: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    state: tuple[str, ...] = ()
    conv: tuple[str, ...] = ()
    dt_rank: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()

    def mesh_axes(self, axis: Logical) -> tuple[str, ...]:
        """Mesh axes that a dimension of this meaning is split over; None is replicated."""
        if isinstance(axis, tuple):
            return tuple(mesh_axis for part in axis for mesh_axis in self.mesh_axes(part))
        return getattr(self, axis.value) if axis is not None else ()

    def spec(self, axes: Sequence[Logical]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical axes."""
        return PartitionSpec(*(self.mesh_axes(axis) or None for axis in axes))

    def within(self, mesh: Mesh | AbstractMesh) -> "ShardingRules":
        """The rules under a mesh of any axes: only those of its axes that are ours to split arrays over.

        Arrays that are split over explicit or manual axes say so themselves.
        """
        kept = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
        axes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: tuple(axis for axis in given if axis in kept) for name, given in axes.items()}
        )

    def parts(self, mesh: Mesh | AbstractMesh, axis: Logical) -> int:
        """Number of parts that a dimension of this meaning is split into."""
        return math.prod(mesh.shape[mesh_axis] for mesh_axis in self.mesh_axes(axis))


RULES = ShardingRules()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, sequence, tensor) mesh over `devices`, all of the process group by default.

    TPU slices that only a data-centre network joins divide the data axis before anything else does.

    Raises:
        InputError: the sizes do not multiply to the number of devices, or the data axis is not a multiple of the
            slices.
    """
    devices = jax.devices() if devices is None else devices
    names = tuple(field.name for field in dataclasses.fields(config))
    given = " x ".join(f"{name}={getattr(config, name)}" for name in names)
    sizes = [getattr(config, name) for name in names]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh {given} does not fit {len(devices)} devices: the product must equal their number (-1 takes what "
            "remains)"
        )
    # Hosts of GPUs count as slices as well, but may share any axis: their networks differ in speed, not in kind.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices > 1 and sizes[0] % slices:
        raise InputError(
            f"mesh {given}: the data axis of {sizes[0]} cannot be split over {slices} slices: make mesh.data a multiple"
        )
    # The sides of a torus are fewer than the mesh may have axes, and rarely of the same sizes.
    if slices > 1:
        within, joined = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, joined, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def batch_sharding(mesh: Mesh, *, dims: int = 2) -> NamedSharding:
    """Sharding of a (batch, length) array of tokens, or of one value per row with `dims=1`."""
    return NamedSharding(mesh, RULES.spec((Axis.BATCH, Axis.LENGTH)[:dims]))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that a batch is split into."""
    return RULES.parts(mesh, Axis.BATCH)


def repeatable(mesh: Mesh) -> dict[str, bool]:
    """Options for `jax.jit` under which a program gives the same bits whenever it is compiled and run on this mesh.

    XLA for GPUs otherwise times several kernels for each matrix product while it compiles and takes the fastest, and
    they differ in the order of their sums. On TPUs and CPUs it has nothing to choose.
    """
    is_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return {"xla_gpu_exclude_nondeterministic_ops": True} if is_gpu else {}


def process_rows(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which rows of a batch a process has to supply: (index, count), the run `index` of `count` equal runs.

    It is the shortest such run that holds every row of the process' devices. Processes that share rows, because the
    sequence or tensor axis spans them, get the same run.

    Args:
        mesh: the device mesh.
        process: its number; None is this one.
    """
    process = jax.process_index() if process is None else process
    shards = batch_shards(mesh)
    # Rows are split over the mesh axes in the order of the rule, which is that of the mesh.
    devices = mesh.devices.reshape(shards, -1)
    held = [row for row in range(shards) if any(device.process_index == process for device in devices[row])]
    if not held:
        return 0, 1
    for count in range(shards, 1, -1):
        if shards % count == 0 and held[0] * count // shards == held[-1] * count // shards:
            return held[0] * count // shards, count
    return 0, 1


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch[T](mesh: Mesh, batch: T) -> T:
    """Moves a tree of (batch, length) and (batch,) arrays, the rows of `process_rows` of each, onto the devices."""
    index, count = process_rows(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        size = rows.shape[0]

        def part(where: Any) -> np.ndarray:
            first, stop, _ = where[0].indices(size * count)
            return rows[(slice(first - index * size, stop - index * size), *where[1:])]

        sharding = batch_sharding(mesh, dims=rows.ndim)
        return jax.make_array_from_callback((size * count, *rows.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def parameter_sharding(mesh: Mesh, shape: Sequence[int], axes: Sequence[Axis | None], *, name: str) -> NamedSharding:
    """Sharding of a parameter, after checking that every split dimension divides evenly.

    Args:
        mesh: the device mesh.
        shape: of the parameter.
        axes: a logical axis for every dimension.
        name: of the parameter, for the error message.

    Raises:
        InputError: a dimension is not a multiple of the devices it is split over.
    """
    for dim, axis in zip(shape, axes, strict=True):
        parts = RULES.parts(mesh, axis)
        if dim % parts:
            raise InputError(
                f"parameter {name}: dimension {axis} of size {dim} cannot be split over {parts} devices "
                f"(mesh axes {', '.join(RULES.mesh_axes(axis))}); change the mesh or the size"
            )
    return NamedSharding(mesh, RULES.spec(axes))


def constrain(x: jax.Array, *axes: Logical) -> jax.Array:
    """Pins an activation to the rules under the mesh of `jax.set_mesh`; without a mesh they speak of, `x` is unchanged.

    A dimension that does not divide evenly, such as the length of a single token, is not split.

    Args:
        x: the activation.
        *axes: a logical axis, several that the dimension enumerates, or None, for every dimension.
    """
    mesh, rules = _current()
    if rules is None:
        return x
    even = [None if dim % rules.parts(mesh, axis) else axis for dim, axis in zip(x.shape, axes, strict=True)]
    return jax.lax.with_sharding_constraint(x, rules.spec(even))


def in_context(array: jax.Array) -> jax.Array:
    """The array, whole on every device of the mesh of `jax.set_mesh` if explicit axes of its type are others'."""
    mesh, named = jax.sharding.get_abstract_mesh(), jax.typeof(array).sharding.mesh
    if mesh == named or mesh.empty or not (mesh.explicit_axes or named.explicit_axes):
        return array
    return jax.reshard(array, PartitionSpec())


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """X W, summed over the last dimension of x and the first of W.

    Under explicit mesh axes the result is split as x is, and over outputs as W is where x leaves the axes free.
    """
    x_spec, kernel_spec = (tuple(jax.typeof(array).sharding.spec) for array in (x, kernel))
    if not any((*x_spec, *kernel_spec)):
        return jnp.tensordot(x, kernel, axes=1)
    taken = {name for part in x_spec if part is not None for name in (part if isinstance(part, tuple) else (part,))}
    outputs = [
        None if part is None or taken & set(part if isinstance(part, tuple) else (part,)) else part
        for part in kernel_spec[1:]
    ]
    kernel = jax.reshard(kernel, PartitionSpec(x_spec[-1], *outputs))
    return jnp.tensordot(x, kernel, axes=1, out_sharding=PartitionSpec(*x_spec[:-1], *outputs))


def sharding_of_rows(indices: jax.Array) -> PartitionSpec | None:
    """How rows of a table that are looked up lie under explicit mesh axes: as their indices; None without such axes."""
    kind = jax.typeof(indices).sharding
    return PartitionSpec(*kind.spec, None) if kind.mesh.explicit_axes else None


def _current() -> tuple[AbstractMesh, ShardingRules | None]:
    """The mesh of `jax.set_mesh`, and the rules that hold under it; None if they leave all arrays as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    rules = RULES.within(mesh)
    return mesh, rules if any(dataclasses.astuple(rules)) else None


def per_shard[*Outputs](
    function: Callable[..., tuple[*Outputs]],
    arrays: Mapping[str, jax.Array | None],
    axes: Mapping[str, Sequence[Logical]],
    out_axes: Sequence[Sequence[Logical]],
) -> tuple[*Outputs]:
    """Calls an operation on every device's part of its arguments, under the mesh of `jax.set_mesh`.

    For operations that treat batch rows and channels apart, and parts of the length with the help of
    `mamba_jax.models.sequence_parallel`. Left to itself, the partitioner does not see that through
    a loop or a kernel, and gathers the whole batch on every device. Gradients of an argument that several devices
    share are summed over them. An axis that does not divide evenly, such as the batch of a single prompt, is computed
    whole by every device.

    Args:
        function: called with keyword arguments; gives a tuple of arrays.
        arrays: arguments by name; None is passed on.
        axes: logical axes of every argument that is not None.
        out_axes: logical axes of every output.

    Returns:
        What `function` returns for the whole arrays.
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
        # Off, it changes nothing under our own mesh; inside another's `jax.shard_map` types must go on being right.
        check_vma=bool(mesh.manual_axes),
    )
    # Outside of jit JAX maps over all axes of a mesh only.
    return (jax.jit(mapped) if mesh.explicit_axes else mapped)(present)


def parts(axis: Axis, size: int) -> int:
    """Number of parts into which `per_shard` splits a dimension of this meaning and size; 1 without a mesh."""
    mesh, rules = _current()
    count = 1 if rules is None else rules.parts(mesh, axis)
    return 1 if size % count else count


def shard_number(axis: Axis) -> jax.Array:
    """Inside `per_shard`: which part of the dimensions of this meaning the device works on, counted from 0."""
    return jax.lax.axis_index(RULES.mesh_axes(axis))


def shard_count(axis: Axis) -> int:
    """Inside `per_shard`: number of parts of the dimensions of this meaning."""
    return jax.lax.axis_size(RULES.mesh_axes(axis))


def from_shard[T](tree: T, axis: Axis, *, before: int) -> T:
    """Inside `per_shard`: the arrays of the shard that is `before` shards earlier; zeros where there is none.

    Args:
        tree: of arrays.
        axis: whose shards are meant.
        before: distance; negative for a later shard.
    """
    count = shard_count(axis)
    steps = [(source, source + before) for source in range(count) if 0 <= source + before < count]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, RULES.mesh_axes(axis), steps), tree)


def from_last[T](tree: T, axis: Axis) -> T:
    """Inside `per_shard`: the arrays of the last shard."""
    is_last = shard_number(axis) == shard_count(axis) - 1
    return jax.tree.map(
        lambda array: jax.lax.psum(jnp.where(is_last, array, jnp.zeros_like(array)), RULES.mesh_axes(axis)), tree
    )
