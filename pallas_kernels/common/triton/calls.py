"""What steps of one token that run as Triton kernels share: what they decline, and how kernels are called."""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import decline_double_precision, decline_symbolic_sizes
from pallas_kernels.common.triton import launch
from pallas_kernels.common.triton.launch import Launch
from pallas_kernels.common.triton.tiles import (
    NormConstants,
    PartsConstants,
    SumConstants,
    Tile,
    by_column,
    next_power_of_two,
)

_PRODUCTS = "pallas_kernels.common.triton.products"
_NORM_WARPS = 4
_SUM_COLUMNS = 512
_SUM_WARPS = 4


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
    kernel = kernels(_PRODUCTS).normalize
    return launch.run(kernel, inputs, outputs, constants, Launch(programs=rows, warps=_NORM_WARPS))["normalized"]


def multiply_in_parts(arguments: Any, x_BK: jax.Array, matrix: str, tile: Tile) -> jax.Array:
    """(P, B, columns), x times one of a step's matrices in parts of the sum, float32."""
    rows, terms = x_BK.shape
    inputs = {"x": x_BK} | matrices(arguments, weight=matrix)
    channels = inputs["weight"].shape[0]
    sizes = tile.constants(rows, inputs["weight"])
    constants = PartsConstants(ROWS=rows, TERMS=terms, CHANNELS=channels, PARTS=tile.parts, **sizes)
    outputs = {"parts": float32(tile.parts, rows, channels)}
    kernel = kernels(_PRODUCTS).multiply_in_parts
    return launch.run(kernel, inputs, outputs, constants, launch_of(tile, constants.programs))["parts"]


def sum_parts(arguments: Any, parts_PBC: jax.Array) -> jax.Array:
    """(B, columns), a product of its parts, rounded to a step's compute dtype."""
    constants = _of_sum(arguments, parts_PBC)
    outputs = {"total": rounded(arguments, *parts_PBC.shape[1:])}
    shape = Launch(programs=constants.ROWS * constants.blocks, warps=_SUM_WARPS)
    return launch.run(kernels(_PRODUCTS).sum_parts, {"parts": parts_PBC}, outputs, constants, shape)["total"]


def add_to_residual(arguments: Any, parts_PBD: jax.Array) -> jax.Array:
    """A step's residual stream and a product in parts, in place of the residual stream."""
    constants = _of_sum(arguments, parts_PBD)
    inputs = {"residual": arguments.residual, "parts": parts_PBD}
    outputs = {"new_residual": same(arguments.residual)}
    programs = constants.ROWS * constants.blocks
    shape = Launch(programs=programs, warps=_SUM_WARPS, in_place={"new_residual": "residual"})
    return launch.run(kernels(_PRODUCTS).add_to_residual, inputs, outputs, constants, shape)["new_residual"]


def _of_sum(arguments: Any, parts: jax.Array) -> SumConstants:
    """What a kernel that adds parts is compiled for."""
    count, rows, channels = parts.shape
    columns = min(next_power_of_two(channels), _SUM_COLUMNS)
    is_bfloat16 = arguments.compute_dtype == jnp.bfloat16
    return SumConstants(ROWS=rows, CHANNELS=channels, COLUMNS=columns, PARTS=count, IS_BFLOAT16=is_bfloat16)
