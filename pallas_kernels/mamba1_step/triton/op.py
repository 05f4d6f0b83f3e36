"""The Mamba-1 step as four Triton kernels: what a few rows cost is the weights' way from memory, and every launch.

`project_in` does norm, in-projection, convolution and SiLU, `project_selection` the x-projection in parts, `advance`
adds the parts, projects dt and advances the recurrence, and `project_out` adds to the residual stream. Window, state
and residual stream are written in place. With many rows XLA's products do the three large projections.
"""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import decline_double_precision, decline_symbolic_sizes
from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, StepArguments
from pallas_kernels.mamba1_step.triton import launch
from pallas_kernels.mamba1_step.triton.constants import ProductConstants, Sizes, StepConstants, next_power_of_two
from pallas_kernels.mamba1_step.triton.launch import Launch
from pallas_kernels.mamba1_step.triton.tilings import MOST_ROWS, Tile, Tiling, default_tiling
from pallas_kernels.mamba1_step.xla.op import normalized

_FOLDER = "pallas_kernels.mamba1_step.triton"
# Values of the x-projection, parts times terms of dt, that a program loads at a time.
_VALUES = 4096


def mamba1_step(arguments: StepArguments, *, tiling: Tiling | None = None) -> Mamba1StepOutput:
    """See `pallas_kernels.mamba1_step.api.mamba1_step`; `tiling` replaces the default one.

    Raises:
        NotImplementedError: the target is not a CUDA GPU of compute capability 8.0 or more, triton is not installed, an
            argument is float64, the compute dtype is neither bfloat16 nor float32, the residual stream is not float32,
            or a size is not known.
    """
    op = arguments.op
    decline_double_precision("triton", arguments)
    decline_symbolic_sizes(op, "triton", arguments.residual, arguments.state)
    if arguments.in_proj.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{op}: 'triton' computes in bfloat16 or float32, got {arguments.in_proj.dtype}")
    if arguments.residual.dtype != jnp.float32:
        raise NotImplementedError(f"{op}: 'triton' takes a float32 residual, got {arguments.residual.dtype}")
    launch.require_triton(op)
    rows, width = arguments.residual.shape
    tiling = tiling or default_tiling(rows, width=width)
    return (_few_rows if rows <= MOST_ROWS else _many_rows)(arguments, tiling)


def _few_rows(arguments: StepArguments, tiling: Tiling) -> Mamba1StepOutput:
    """Every projection by a kernel."""
    first = project_in(arguments, tiling.project_in, has_selection=tiling.project_selection is None)
    x_BE, parts_PBM = first["x"], first["parts"]
    if tiling.project_selection is not None:
        parts_PBM = project_selection(arguments, x_BE, tiling.project_selection)
    y_BE, state_BEN = advance(arguments, parts_PBM, x_BE, first["z"], tiling)
    residual_BD = project_out(arguments, y_BE, tiling.project_out)
    return Mamba1StepOutput(residual=residual_BD, window=first["new_window"], state=state_BEN)


def _many_rows(arguments: StepArguments, tiling: Tiling) -> Mamba1StepOutput:
    """In-, x- and out-projection by XLA, the rest by kernels that read x and z where the in-projection left them."""
    width, channels = arguments.residual.shape[1], arguments.A.shape[0]
    xz_BF = jnp.dot(normalized(arguments), arguments.in_proj.reshape(width, 2 * channels))
    x_BE, window_BWE = convolve(arguments, xz_BF, tiling.convolve)
    selection_BM = jnp.dot(x_BE, arguments.x_proj)
    y_BE, state_BEN = advance(arguments, selection_BM[None], x_BE, xz_BF, tiling)
    residual_BD = arguments.residual + jnp.dot(y_BE, arguments.out_proj).astype(jnp.float32)
    return Mamba1StepOutput(residual=residual_BD, window=window_BWE, state=state_BEN)


def project_in(arguments: StepArguments, tile: Tile, *, has_selection: bool) -> dict[str, jax.Array]:
    """What convolution and SiLU make of x, z, the new window, and parts of the x-projection if it is made here."""
    constants = _of_product(arguments, tile, EPS=arguments.eps, HAS_SELECTION=has_selection)
    x_type = _like(arguments.in_proj, constants.ROWS, constants.E)
    parts = (constants.blocks, constants.ROWS, constants.selection) if has_selection else (1,)
    names = ("residual", "norm_scale", "in_proj", "conv_weight", "conv_bias", "window", "x_proj")
    inputs = {name: getattr(arguments, name) for name in names}
    inputs = {"weight" if name == "in_proj" else name: array for name, array in inputs.items()}
    outputs = {"x": x_type, "z": x_type, "new_window": _same(arguments.window), "parts": _float32(*parts)}
    return launch.run(
        _kernels("products").project_in,
        inputs,
        outputs,
        constants,
        _launch(tile, 2 * constants.blocks, new_window="window"),
    )


def convolve(arguments: StepArguments, xz_BF: jax.Array, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """What convolution and SiLU make of x, and the new window, from the in-projection (B, 2 E)."""
    constants = _of_product(arguments, tile, M=tile.depth)
    inputs = {"xz": xz_BF} | {name: getattr(arguments, name) for name in ("conv_weight", "conv_bias", "window")}
    outputs = {"x": _like(xz_BF, constants.ROWS, constants.E), "new_window": _same(arguments.window)}
    programs = -(-constants.ROWS // constants.M) * constants.blocks
    shape = _launch(tile, programs, new_window="window")
    results = launch.run(_kernels("products").convolve, inputs, outputs, constants, shape)
    return results["x"], results["new_window"]


def project_selection(arguments: StepArguments, x_BE: jax.Array, tile: Tile) -> jax.Array:
    """The x-projection in parts of its sum, (P, B, R + 2 N), float32."""
    constants = _of_product(arguments, tile, PARTS=tile.parts)
    outputs = {"parts": _float32(tile.parts, constants.ROWS, constants.selection)}
    programs = tile.parts * -(-constants.selection // tile.columns)
    kernel = _kernels("products").project_selection
    inputs = {"x": x_BE, "weight": arguments.x_proj}
    return launch.run(kernel, inputs, outputs, constants, _launch(tile, programs))["parts"]


def advance(
    arguments: StepArguments, parts_PBM: jax.Array, x_BE: jax.Array, z: jax.Array, tiling: Tiling
) -> tuple[jax.Array, jax.Array]:
    """The gated output y (B, E) and the new state; z is (B, E), or the in-projection (B, 2 E) whose second half it is.

    Args:
        arguments: of the step.
        parts_PBM: the x-projection in parts of its sum.
        x_BE: the input of the recurrence.
        z: the gate.
        tiling: of the kernels.
    """
    tile, sizes = tiling.advance, _sizes(arguments)
    # The more terms at a time, the less often a program waits for memory; several parts of 16 rows fill its registers.
    parts = parts_PBM.shape[0]
    most = max(_VALUES // next_power_of_two(parts), 16) if tile.rows == 1 else (256 if parts == 1 else 64)
    constants = StepConstants(
        **vars(sizes),
        M=tile.rows,
        CHANNELS=tile.channels,
        RANK=min(max(next_power_of_two(sizes.R), 16), most),
        PARTS=parts,
        Z_STRIDE=z.shape[1],
        Z_OFFSET=z.shape[1] - sizes.E,
    )
    inputs = {"parts": parts_PBM} | {name: getattr(arguments, name) for name in ("dt_proj", "dt_bias", "A", "D")}
    inputs |= {"x": x_BE, "z": z, "state": arguments.state}
    outputs = {"y": _same(x_BE), "new_state": _same(arguments.state)}
    programs = -(-sizes.ROWS // tile.rows) * constants.blocks
    shape = Launch(programs=programs, warps=tile.warps, in_place={"new_state": "state"})
    results = launch.run(_kernels("recurrence").advance, inputs, outputs, constants, shape)
    return results["y"], results["new_state"]


def project_out(arguments: StepArguments, y_BE: jax.Array, tile: Tile) -> jax.Array:
    """The residual stream after the block."""
    constants = _of_product(arguments, tile)
    inputs = {"residual": arguments.residual, "y": y_BE, "weight": arguments.out_proj}
    outputs = {"new_residual": _same(arguments.residual)}
    shape = _launch(tile, -(-constants.D // tile.columns), new_residual="residual")
    return launch.run(_kernels("products").project_out, inputs, outputs, constants, shape)["new_residual"]


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"{_FOLDER}.{module}")


def _sizes(arguments: StepArguments) -> Sizes:
    """The sizes of a call."""
    rows, width = arguments.residual.shape
    channels, states = arguments.A.shape
    rank, taps = arguments.dt_proj.shape[0], arguments.conv_weight.shape[0]
    return Sizes(ROWS=rows, D=width, E=channels, N=states, R=rank, K=taps)


def _of_product(arguments: StepArguments, tile: Tile, *, M: int = MOST_ROWS, **options: Any) -> ProductConstants:
    """What a kernel that multiplies, or convolves, is compiled for."""
    sizes: dict[str, Any] = vars(_sizes(arguments))
    return ProductConstants(**sizes, M=M, COLUMNS=tile.columns, DEPTH=tile.depth, **options)


def _launch(tile: Tile, programs: int, **in_place: str) -> Launch:
    return Launch(programs=programs, warps=tile.warps, stages=tile.stages, in_place=in_place)


def _like(array: jax.Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _same(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
