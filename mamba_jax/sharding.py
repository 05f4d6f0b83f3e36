"""Logical axes, the rules that map them to mesh axes, and the only sharding constraints of the library.

Every parameter carries the logical axes of its dimensions (`nnx.Param(value, axes=(Axis.EMBED, Axis.INNER))`), and
its optimizer moments inherit them. Activations are constrained with `constrain`. Nothing outside this module names a
mesh axis.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mamba_jax.config import ExperimentConfig, MeshConfig
from mamba_jax.errors import InputError


class Axis(enum.StrEnum):
    """Logical meaning of an array dimension."""

    BATCH = "batch"
    LENGTH = "length"
    EMBED = "embed"
    INNER = "inner"
    STATE = "state"
    CONV = "conv"
    DT_RANK = "dt_rank"
    VOCAB = "vocab"
    LAYERS = "layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axes each logical axis is split over; an empty tuple replicates.

    A field for every `Axis`. EMBED speaks of parameters: the residual stream itself is split by BATCH only.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("fsdp",)
    inner: tuple[str, ...] = ("tensor",)
    state: tuple[str, ...] = ()
    conv: tuple[str, ...] = ()
    dt_rank: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()

    def mesh_axes(self, axis: Axis | None) -> tuple[str, ...]:
        """Mesh axes that a dimension of this meaning is split over; None is replicated."""
        return getattr(self, axis.value) if axis is not None else ()

    def spec(self, axes: Sequence[Axis | None]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical axes."""
        return PartitionSpec(*(self.mesh_axes(axis) or None for axis in axes))


RULES = ShardingRules()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh over `devices`, all of the process group by default.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not fit {len(devices)} "
            "devices: the product must equal their number (-1 takes what remains)"
        )
    return jax.make_mesh(tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a (batch, length) array of tokens."""
    return NamedSharding(mesh, RULES.spec((Axis.BATCH, Axis.LENGTH)))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in RULES.batch)


def check_batches(config: ExperimentConfig, shards: int) -> None:
    """Checks that the batches of training and evaluation can be split over the mesh.

    Raises:
        InputError: a batch is not a multiple of the parts.
    """
    for name, size in (
        ("data.global_batch / train.accumulation_steps", config.data.global_batch // config.train.accumulation_steps),
        ("evaluation.batch_size", config.evaluation_batch_size),
    ):
        if size % shards:
            raise InputError(
                f"{name} = {size} sequences cannot be split over {shards} batch shards (mesh data x fsdp): "
                "change the batch or the mesh"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch[T](mesh: Mesh, batch: T) -> T:
    """Moves a tree of (batch, length) arrays, this process' rows of each, onto the devices."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(batch_sharding(mesh), rows), batch)


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
        mesh_axes = RULES.mesh_axes(axis)
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if dim % parts:
            raise InputError(
                f"parameter {name}: dimension {axis} of size {dim} cannot be split over {parts} devices "
                f"(mesh axes {', '.join(mesh_axes)}); change the mesh or the size"
            )
    return NamedSharding(mesh, RULES.spec(axes))


def constrain(x: jax.Array, *axes: Axis | None) -> jax.Array:
    """Pins an activation to the rules under the mesh of `jax.set_mesh`; without a mesh it returns `x` unchanged.

    Args:
        x: the activation.
        *axes: a logical axis, or None, for every dimension.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, RULES.spec(axes))


def per_shard[*Outputs](
    function: Callable[..., tuple[*Outputs]],
    arrays: Mapping[str, jax.Array | None],
    axes: Mapping[str, Sequence[Axis | None]],
    out_axes: Sequence[Sequence[Axis | None]],
) -> tuple[*Outputs]:
    """Calls an operation on every device's part of its arguments, under the mesh of `jax.set_mesh`.

    For operations that treat batch rows and channels apart. Left to itself, the partitioner does not see that through
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
    if jax.sharding.get_abstract_mesh().empty:
        return function(**arrays)
    present = {name: array for name, array in arrays.items() if array is not None}
    absent = dict.fromkeys(arrays.keys() - present.keys())
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    uneven = {
        axis
        for name, array in present.items()
        for dim, axis in zip(array.shape, axes[name], strict=True)
        if dim % math.prod(mesh_shape[mesh_axis] for mesh_axis in RULES.mesh_axes(axis))
    }

    def spec(axes: Sequence[Axis | None]) -> PartitionSpec:
        return RULES.spec([None if axis in uneven else axis for axis in axes])

    return jax.shard_map(
        lambda shards: function(**shards, **absent),
        in_specs=({name: spec(axes[name]) for name in present},),
        out_specs=tuple(spec(output) for output in out_axes),
        check_vma=False,
    )(present)
