"""Tracing and compiling for devices that need not be there."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
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
    # nor what a metadata server says about this machine.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # The two cores of a v4 chip are one device, as they are by default on Cloud TPU.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
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


def compiled_instructions(text: str) -> Iterator[tuple[str, int]]:
    """The instructions that a compiled program runs one after the other, and how often each of them runs.

    Args:
        text: of the program, from `Compiled.as_text`; loops count up to the largest number in their condition, and what
            runs on another unit of the chip counts like the rest.
    """
    bodies, entry = _computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in bodies[name]:
            yield line, times
            if offloaded := re.search(r"call-start\(.*called_computations=\{%([^\s,}]+)", line):
                yield from walk(offloaded[1], times)
            if loop := re.search(r" while\((%\S+?)\).*condition=%(\S+?), body=%(\S+?)[,\s]", line + " "):
                yield from walk(loop[3], times * _turns("\n".join(bodies[loop[2]]), loop[1], bodies[name]))

    yield from walk(entry, 1)


def _turns(condition: str, start: str, lines: Sequence[str]) -> int:
    """How often a loop runs that counts in steps of one.

    Args:
        condition: text of its condition.
        start: name of the tuple of values that it starts from.
        lines: that the loop stands among; the compiler takes the first turn of some loops out, and counts from 1.
    """
    bounds = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
    counter = re.search(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", condition)
    if not bounds or counter is None:
        return 1
    defined = dict(re.findall(r"^ *(%\S+) = (.*)$", "\n".join(lines), re.MULTILINE))
    values = re.search(r" tuple\((.*?)\)", re.sub(r"/\*.*?\*/", "", defined.get(start, "")))
    value = defined.get(values[1].split(", ")[int(counter[1])], "") if values is not None else ""
    while copied := re.search(r" copy\((%\S+?)\)", value):
        value = defined.get(copied[1], "")
    first = re.search(r"[su]32\[\]\S* constant\((\d+)\)", value)
    return max(map(int, bounds)) - (0 if first is None else int(first[1]))


def fused_instructions(text: str) -> Iterator[tuple[str, str, int]]:
    """The instructions inside the fusions that a compiled program runs: name of the fusion, instruction, how often.

    Args:
        text: as of `compiled_instructions`.
    """
    bodies, _ = _computations(text)

    def inside(line: str, times: int) -> Iterator[tuple[str, str, int]]:
        if fusion := re.search(r" fusion\(.*calls=%([^\s,}]+)", line):
            for inner in bodies[fusion[1]]:
                yield fusion[1], inner, times
                yield from inside(inner, times)

    for line, times in compiled_instructions(text):
        yield from inside(line, times)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation of a compiled program, by name, and the name of the one that starts it."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry
