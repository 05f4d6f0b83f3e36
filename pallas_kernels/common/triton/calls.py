"""What steps of one token that run as Triton kernels share: what they decline, and how kernels are called."""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import decline_double_precision, decline_symbolic_sizes
from pallas_kernels.common.triton import launch
from pallas_kernels.common.triton.launch import Launch
from pallas_kernels.common.triton.tiles import ConvolutionConstants, Tile


def decline(arguments: Any, backend: str) -> None:
    """Raises NotImplementedError unless a step's kernels run on the target and take the arguments' sizes and dtypes.

    Args:
        arguments: of a step, with a residual stream, a state and `in_proj`.
        backend: its name.
    """
    op = arguments.op
    decline_double_precision(backend, arguments)
    decline_symbolic_sizes(op, backend, arguments.residual, arguments.state)
    if arguments.in_proj.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{op}: '{backend}' computes in bfloat16 or float32, got {arguments.in_proj.dtype}")
    if arguments.residual.dtype != jnp.float32:
        raise NotImplementedError(f"{op}: '{backend}' takes a float32 residual, got {arguments.residual.dtype}")
    launch.require_triton(op)


def kernels(module: str) -> ModuleType:
    """A module of kernels, which needs triton."""
    return importlib.import_module(module)


def like(array: jax.Array, *shape: int) -> jax.ShapeDtypeStruct:
    """An output of a shape, in the dtype of an array."""
    return jax.ShapeDtypeStruct(shape, array.dtype)


def same(array: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of an array's shape and dtype."""
    return like(array, *array.shape)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """An output in float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def launch_of(tile: Tile, programs: int, **in_place: str) -> Launch:
    """The launch of a kernel that works on tiles; `in_place` is by output the input that it replaces."""
    return Launch(programs=programs, warps=tile.warps, stages=tile.stages, in_place=in_place)


def convolve(
    inputs_BF: jax.Array,
    offset: int,
    *,
    weight: jax.Array,
    bias: jax.Array,
    window: jax.Array,
    tile: Tile,
) -> tuple[jax.Array, jax.Array]:
    """Convolution and SiLU of one token, and the window a token later, in place of the old one.

    Args:
        inputs_BF: (B, F), whose channels from `offset` on are convolved.
        offset: the first of them.
        weight: (K, E).
        bias: (E,).
        window: (B, K - 1, E).
        tile: of which columns and warps count, and `depth` is the rows.
    """
    taps, channels = weight.shape
    constants = ConvolutionConstants(
        ROWS=inputs_BF.shape[0],
        M=tile.depth,
        COLUMNS=tile.columns,
        E=channels,
        K=taps,
        STRIDE=inputs_BF.shape[1],
        OFFSET=offset,
    )
    inputs = {"inputs": inputs_BF, "conv_weight": weight, "conv_bias": bias, "window": window}
    outputs = {"x": like(inputs_BF, constants.ROWS, channels), "new_window": same(window)}
    programs = -(-constants.ROWS // constants.M) * constants.blocks
    shape = launch_of(tile, programs, new_window="window")
    kernel = kernels("pallas_kernels.common.triton.convolution").convolve
    results = launch.run(kernel, inputs, outputs, constants, shape)
    return results["x"], results["new_window"]
