"""What steps of one token that run as Triton kernels share: what they decline, and how kernels are called."""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import decline_double_precision, decline_symbolic_sizes
from pallas_kernels.common.triton import launch
from pallas_kernels.common.triton.launch import Launch
from pallas_kernels.common.triton.tiles import ConvolutionConstants, NormConstants, Tile, by_column

_NORM_WARPS = 4


def decline(arguments: Any, backend: str) -> None:
    """Raises NotImplementedError unless a step's kernels run on the target and take the arguments' sizes and dtypes.

    Args:
        arguments: of a step, with a residual stream, a state and `in_proj`.
        backend: its name.
    """
    op = arguments.op
    decline_double_precision(backend, arguments)
    decline_symbolic_sizes(op, backend, arguments.residual, arguments.state)
    if arguments.compute_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{op}: '{backend}' computes in bfloat16 or float32, got {arguments.compute_dtype}")
    if arguments.residual.dtype != jnp.float32:
        raise NotImplementedError(f"{op}: '{backend}' takes a float32 residual, got {arguments.residual.dtype}")
    launch.require_triton(op)


def kernels(module: str) -> ModuleType:
    """A module of kernels, which needs triton."""
    return importlib.import_module(module)


def rounded(arguments: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """An output of a shape, in a step's compute dtype."""
    return jax.ShapeDtypeStruct(shape, arguments.compute_dtype)


def same(array: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of an array's shape and dtype."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def matrices(arguments: Any, **names: str) -> dict[str, jax.Array]:
    """Inputs of a kernel: a step's matrices by columns, and after each, by `..._scale`, the scales of its columns.

    Args:
        arguments: of the step.
        **names: by the kernel's name of an input, the step's.
    """
    inputs = {}
    for name, of_step in names.items():
        matrix, scale = getattr(arguments, of_step), getattr(arguments, f"{of_step}_scale")
        # Nobody reads the scales of a matrix that is not int8; something has to stand there.
        scale = arguments.norm_scale if scale is None else scale.reshape(-1).astype(jnp.float32)
        inputs |= {name: by_column(matrix), f"{name}_scale": scale}
    return inputs


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """An output in float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def launch_of(tile: Tile, programs: int, **in_place: str) -> Launch:
    """The launch of a kernel that works on tiles; `in_place` is by output the input that it replaces."""
    return Launch(programs=programs, warps=tile.warps, stages=tile.stages, in_place=in_place)


def normalize(arguments: Any) -> jax.Array:
    """(B, D), the normalised residual stream of a step in the compute dtype."""
    rows, width = arguments.residual.shape
    constants = NormConstants(D=width, EPS=arguments.eps)
    inputs = {"residual": arguments.residual, "norm_scale": arguments.norm_scale}
    outputs = {"normalized": rounded(arguments, rows, width)}
    kernel = kernels("pallas_kernels.common.triton.products").normalize
    return launch.run(kernel, inputs, outputs, constants, Launch(programs=rows, warps=_NORM_WARPS))["normalized"]


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
    outputs = {"x": jax.ShapeDtypeStruct((constants.ROWS, channels), inputs_BF.dtype), "new_window": same(window)}
    programs = -(-constants.ROWS // constants.M) * constants.blocks
    shape = launch_of(tile, programs, new_window="window")
    kernel = kernels("pallas_kernels.common.triton.convolution").convolve
    results = launch.run(kernel, inputs, outputs, constants, shape)
    return results["x"], results["new_window"]
