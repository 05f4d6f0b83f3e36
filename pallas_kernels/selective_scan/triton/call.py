"""Triton kernels as JAX operations, by way of jax-triton. Both packages are optional and imported when first needed."""

import importlib
from collections.abc import Hashable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.devices import cuda_compute_capability
from pallas_kernels.common.partitioning import varying_like

# Ampere, the first generation that the kernels are compiled for in `tests/kernels/test_selective_scan_triton.py`.
MINIMUM_COMPUTE_CAPABILITY = 80


def import_kernels(op: str, module: str) -> ModuleType:
    """Imports a module of Triton kernels.

    Args:
        op: name of the op, for messages.
        module: full name of the module.

    Raises:
        NotImplementedError: the target is not a CUDA GPU of compute capability 8.0 or more, or jax-triton or triton is
            not installed.
    """
    # Asked first: without such a GPU the answer is the same whether or not the packages are there.
    capability = cuda_compute_capability()
    if capability is None or capability < MINIMUM_COMPUTE_CAPABILITY:
        raise NotImplementedError(f"{op}: 'triton' needs a CUDA GPU of compute capability 8.0 or more")
    try:
        importlib.import_module("jax_triton")
        kernels = importlib.import_module(module)
    except ImportError as error:
        raise NotImplementedError(f"{op}: 'triton' needs jax-triton and triton; install the cuda extra") from error
    return kernels


def call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    constants: Mapping[str, Hashable],
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
        constants: compile-time parameters: numbers, or frozen dataclasses whose attributes the kernel reads.
        programs: size of the grid.
        warps: number of warps (32 threads each) of a program.
        name: name of the kernel in profiles.

    Returns:
        The outputs that are not None.
    """
    # Arguments go by position; this catches a kernel and a caller that disagree about the order.
    assert kernel.arg_names == [*inputs, *outputs, *constants]
    # A kernel has a fixed number of pointers. What it does not read may be any array; what it does not write is one
    # number.
    unread = next(array for array in inputs.values() if array is not None)
    unwritten = jax.ShapeDtypeStruct((1,), jnp.float32)
    results = importlib.import_module("jax_triton").triton_call(
        *(unread if array is None else array for array in inputs.values()),
        kernel=kernel,
        out_shape=[unwritten if output is None else output for output in outputs.values()],
        grid=(programs,),
        num_warps=warps,
        # Triton's own prefetching is off: the kernels load a tile ahead by themselves.
        num_stages=1,
        compute_capability=cuda_compute_capability(),
        name=name,
        **constants,
    )
    written = {key: result for key, result in zip(outputs, results, strict=True) if outputs[key] is not None}
    return varying_like(unread, written)
