"""Triton kernels as JAX operations, by way of jax-triton. Both packages are optional and imported when first needed."""

import importlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import target_platform

MINIMUM_COMPUTE_CAPABILITY = 80
# Of GPUs that programs are compiled for where there is none to ask, by a word of their name.
_COMPUTE_CAPABILITIES = {
    "A100": 80,
    "A30": 80,
    "A10": 86,
    "A10G": 86,
    "A40": 86,
    "L4": 89,
    "L40": 89,
    "L40S": 89,
    "H100": 90,
    "H200": 90,
    "GH200": 90,
    "B200": 100,
    "GB200": 100,
}


def import_kernels(op: str, module: str) -> ModuleType:
    """Imports a module of Triton kernels.

    Args:
        op: name of the op, for messages.
        module: full name of the module.

    Raises:
        NotImplementedError: the target is no CUDA GPU of compute capability 8.0 or more, or jax-triton or triton is not
            installed.
    """
    if target_platform() != "gpu":
        raise NotImplementedError(f"{op}: 'triton' is for CUDA GPUs, the target is {target_platform()!r}")
    try:
        importlib.import_module("jax_triton")
        kernels = importlib.import_module(module)
    except ImportError as error:
        raise NotImplementedError(f"{op}: 'triton' needs jax-triton and triton; install the cuda extra") from error
    if compute_capability() < MINIMUM_COMPUTE_CAPABILITY:
        raise NotImplementedError(f"{op}: 'triton' needs compute capability 8.0, the GPU has {compute_capability()}")
    return kernels


def compute_capability() -> int:
    """Ten times the compute capability of the target GPU, such as 90.

    Raises:
        NotImplementedError: it is no CUDA GPU, or it is only compiled for and unknown here.
    """
    if jax.default_backend() == "gpu":
        version = str(getattr(jax.local_devices()[0], "compute_capability", ""))
        if re.fullmatch(r"\d+\.\d", version):
            return int(version.replace(".", ""))
        raise NotImplementedError(f"triton: the GPU has no CUDA compute capability, but {version!r}")
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else str(device.device_kind)
    for word in re.split(r"[^A-Z0-9]+", kind.upper()):
        if word in _COMPUTE_CAPABILITIES:
            return _COMPUTE_CAPABILITIES[word]
    raise NotImplementedError(f"triton: the compute capability of {kind!r} is not known")


def call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    constants: Mapping[str, int | bool],
    *,
    programs: int,
    warps: int,
    name: str,
) -> dict[str, jax.Array]:
    """Runs a kernel whose parameters are the inputs, the outputs and the constants, in this order.

    Args:
        kernel: a function under `triton.jit`.
        inputs: arrays, row-major; None for one that the kernel does not read.
        outputs: shapes and dtypes; None for one that the kernel does not write.
        constants: compile-time parameters.
        programs: size of the grid.
        warps: of 32 threads, per program.
        name: of the kernel in profiles.

    Returns:
        The outputs that are not None.
    """
    assert kernel.arg_names == [*inputs, *outputs, *constants]
    unread = next(array for array in inputs.values() if array is not None)
    unwritten = jax.ShapeDtypeStruct((1,), jnp.float32)
    results = importlib.import_module("jax_triton").triton_call(
        *(unread if array is None else array for array in inputs.values()),
        kernel=kernel,
        out_shape=[unwritten if output is None else output for output in outputs.values()],
        grid=(programs,),
        num_warps=warps,
        num_stages=1,
        compute_capability=compute_capability(),
        name=name,
        **constants,
    )
    return {key: result for key, result in zip(outputs, results, strict=True) if outputs[key] is not None}
