"""The device mesh, and how parameters and batches are laid out on it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mamba_jax.errors import InputError
from mamba_jax.sharding.axes import RULES, WHOLE_IF_UNEVEN, Axis
from mamba_jax.sharding.config import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, expert, sequence, tensor) mesh over `devices`; None takes all devices of all processes.

    Between TPU slices there is only the slow data-centre network, so the axis that crosses from slice to slice is the
    one that communicates least, the data axis.

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
    # JAX gives each host of GPUs a slice index, too. Any mesh axis may cross GPU hosts: there the same libraries work
    # within a host and between hosts, only slower.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices > 1 and sizes[0] % slices:
        raise InputError(
            f"mesh {given}: the data axis of {sizes[0]} cannot be split over {slices} slices: make mesh.data a multiple"
        )
    # A TPU torus has two or three sides and the mesh five axes, so a side may have to be divided between mesh axes.
    if slices > 1:
        within, joined = (sizes[0] // slices, *sizes[1:]), (slices, *(1,) * (len(sizes) - 1))
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


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """Options for `jax.jit` of a program on this mesh: the same bits from every compilation, products in one piece.

    XLA for GPUs times several kernels for each matrix product during compilation and takes the fastest. The candidates
    sum in different orders, so two compilations could differ in the last bits. Without timing its own Triton products
    would run in a form that is slow for narrow matrices: cuBLAS does them all. XLA for TPUs and CPUs does not choose by
    timing.

    XLA for TPUs cuts a product with a gathered matrix into as many products as devices hold parts of it, above a size
    in MiB, when other dimensions are split as well. With the parts of many devices these are too narrow for the matrix
    units; no matrix reaches the size that is given here.
    """
    platform = mesh.devices.flat[0].platform
    if platform in ("gpu", "cuda"):
        return {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000} if platform == "tpu" else {}


def process_rows(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which rows of a global batch a process has to supply.

    The batch is cut into `count` equal runs of consecutive rows, and the process supplies run `index`: the shortest one
    that holds every row of the devices of this process. Processes that share rows, because the sequence or tensor axis
    spans them, supply the same run.

    Args:
        mesh: the device mesh.
        process: index of the process; None means the one that calls.

    Returns:
        (index, count).
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
    """Makes global arrays on the devices from the rows that each process holds on its host.

    Args:
        mesh: the device mesh.
        batch: tree of numpy arrays, (rows, length) or (rows,), with the rows that `process_rows` assigns this process.

    Returns:
        The same tree of jax arrays with all rows of the batch, laid out by `batch_sharding`.
    """
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

    Heads of keys and values stay whole where they do not.

    Args:
        mesh: the device mesh.
        shape: the parameter's shape.
        axes: the logical axis of each dimension.
        name: the parameter's path, for the error message.

    Raises:
        InputError: a dimension is not a multiple of the devices it is split over.
    """
    axes = [
        None if axis in WHOLE_IF_UNEVEN and dim % RULES.parts(mesh, axis) else axis
        for dim, axis in zip(shape, axes, strict=True)
    ]
    for dim, axis in zip(shape, axes, strict=True):
        parts = RULES.parts(mesh, axis)
        if dim % parts:
            raise InputError(
                f"parameter {name}: dimension {axis} of size {dim} cannot be split over {parts} devices "
                f"(mesh axes {', '.join(RULES.mesh_axes(axis))}); change the mesh or the size"
            )
    return NamedSharding(mesh, RULES.spec(axes))
