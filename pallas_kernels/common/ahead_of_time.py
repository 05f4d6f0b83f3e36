"""Tracing and compiling for devices that need not be there."""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding


def tpu_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Descriptions of the devices of a topology such as "v5e:2x2", or of several slices of it; needs libtpu and no TPU.

    Args:
        topology: generation and chips along the axes of a slice.
        num_slices: slices that a data-centre network joins; with more than one, devices have a `slice_index`.
    """
    # Only the compiler is wanted, so it does not matter whether another process has the library loaded as well,
    # nor what a metadata server says about this machine; without the last two libtpu complains that it has no answer.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    # The two cores of a v4 chip are one device, as they are by default on Cloud TPU.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if set(re.findall(r"\d+", topology.partition(":")[2])) == {"1"}:
        # A host has four chips unless it is told otherwise; newer libtpu (0.0.52) tells it by itself.
        options["chips_per_host_bounds"] = (1, 1, 1)
    if num_slices > 1:
        options["num_slices"] = num_slices
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)


def cuda_devices(description: Path, count: int = 1) -> list[jax.Device]:
    """Descriptions of GPUs from XLA's target configuration in a text file; needs JAX's CUDA plugin and no GPU."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description.read_text(), topology=f"1x1x{count}"
    )
    return list(topology.devices)


def tracing_for_kind(
    platform: str, device_kind: str, num_cores: int | None = None
) -> contextlib.AbstractContextManager:
    """Tells operations that they are traced for a "tpu" or "gpu" of a kind, and not for the default device."""
    target = AbstractDevice(platform=platform, device_kind=device_kind, num_cores=num_cores)
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=target)
    return jax.sharding.use_abstract_mesh(mesh)


def tracing_for_any() -> contextlib.AbstractContextManager:
    """Tells operations that they are traced for devices of any kind, so that they run as XLA compiles them anywhere."""
    return tracing_for_kind("any", "any")


def tracing_for(device: jax.Device) -> contextlib.AbstractContextManager:
    """Tells operations that they are traced for a device, and not for the default one."""
    platform = "tpu" if device.platform == "tpu" else "gpu"
    return tracing_for_kind(platform, device.device_kind, getattr(device, "num_cores", None))


def described(arrays: Any, device: jax.Device) -> Any:
    """Arrays or their shapes as shapes on a device."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arrays)


def compile_for(device: jax.Device, function: Callable, *args: Any) -> jax.stages.Compiled:
    """Compiles a function of arrays of given shapes for a device."""
    with tracing_for(device):
        traced = jax.jit(function).trace(*described(args, device))
        return compile_lowered(traced.lower(lowering_platforms=("tpu" if device.platform == "tpu" else "cuda",)))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program lowered for devices that are not there, past JAX's cache, which could not read it back."""
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
