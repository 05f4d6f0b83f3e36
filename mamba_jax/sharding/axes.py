"""Logical axes of arrays, and the rules that map them to axes of the device mesh."""

import dataclasses
import enum
import math
from collections.abc import Sequence

from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec


class Axis(enum.StrEnum):
    """Logical meaning of an array dimension."""

    BATCH = "batch"
    LENGTH = "length"
    EMBED = "embed"
    INNER = "inner"
    HEADS = "heads"
    KV_HEADS = "kv_heads"
    EXPERT = "expert"
    STATE = "state"
    CONV = "conv"
    DT_RANK = "dt_rank"
    VOCAB = "vocab"
    LAYERS = "layers"


# What a dimension means: one axis; several axes flattened into one dimension, the first varying slowest; or no axis.
type Logical = Axis | tuple[Axis, ...] | None

# Dimensions that every device holds whole where they do not divide evenly; any other must divide.
WHOLE_IF_UNEVEN = frozenset({Axis.KV_HEADS})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """For every `Axis`, the mesh axes that it is split over; an empty tuple means that it is replicated.

    EMBED is used by parameters only: the residual stream is split by BATCH and LENGTH. Devices that hold parts of the
    same sequence need the same parameters, just as devices with different batch rows do, so parameters are spread over
    the mesh axis "sequence" as well as over "fsdp".
    """

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ("sequence",)
    embed: tuple[str, ...] = ("fsdp", "sequence")
    inner: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)
    state: tuple[str, ...] = ()
    conv: tuple[str, ...] = ()
    dt_rank: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()

    def mesh_axes(self, axis: Logical) -> tuple[str, ...]:
        """Mesh axes that a dimension with this logical axis is split over; empty if it is replicated."""
        if isinstance(axis, tuple):
            return tuple(mesh_axis for part in axis for mesh_axis in self.mesh_axes(part))
        return getattr(self, axis.value) if axis is not None else ()

    def spec(self, axes: Sequence[Logical]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical axes."""
        return PartitionSpec(*(self.mesh_axes(axis) or None for axis in axes))

    def within(self, mesh: Mesh | AbstractMesh) -> "ShardingRules":
        """The rules restricted to the mesh axes of `mesh` that are of type Auto.

        Only these are placed by sharding constraints. Over explicit and manual axes (a caller's own mesh, or the inside
        of a `jax.shard_map`) the types of the arrays already say how they are split.
        """
        kept = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
        axes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: tuple(axis for axis in given if axis in kept) for name, given in axes.items()}
        )

    def parts(self, mesh: Mesh | AbstractMesh, axis: Logical) -> int:
        """Number of parts that a dimension with this logical axis is split into."""
        return math.prod(mesh.shape[mesh_axis] for mesh_axis in self.mesh_axes(axis))


RULES = ShardingRules()
