"""The Mamba-1 step as four Triton kernels: what a few rows cost is the weights' way from memory, and every launch.

`project_in` does norm, in-projection, convolution and SiLU, `project_selection` the x-projection in parts, `advance`
adds the parts, projects dt and advances the recurrence, and `project_out` adds to the residual stream. Window, state
and residual stream are written in place. With many rows XLA's products do the three large projections.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.triton import calls, launch
from pallas_kernels.common.triton.calls import float32, launch_of, like, same
from pallas_kernels.common.triton.launch import Launch
from pallas_kernels.common.triton.tiles import (
    MOST_ROWS,
    Tile,
    by_column,
    next_power_of_two,
    product_by_column,
    product_by_row,
)
from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, StepArguments
from pallas_kernels.mamba1_step.triton.constants import ProjectionConstants, Sizes, StepConstants
from pallas_kernels.mamba1_step.triton.tilings import Tiling, column_tiling, default_tiling
from pallas_kernels.mamba1_step.xla.op import normalized, rates

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
    calls.decline(arguments, "triton")
    rows, width = arguments.residual.shape
    tiling = tiling or default_tiling(rows, width=width)
    return (_few_rows if rows <= MOST_ROWS else _many_rows)(arguments, tiling)


def mamba1_step_by_columns(arguments: StepArguments) -> Mamba1StepOutput:
    """`mamba1_step` by kernels that read every matrix by columns; it is fast where matrices lie in memory that way."""
    calls.decline(arguments, "triton_columns")
    rows, width = arguments.residual.shape
    return mamba1_step(arguments, tiling=column_tiling(rows, width=width))


def _few_rows(arguments: StepArguments, tiling: Tiling) -> Mamba1StepOutput:
    """Every projection by a kernel."""
    first = project_in(arguments, tiling)
    x_BE, parts_PBM = first["x"], first["parts"]
    if tiling.project_selection is not None:
        parts_PBM = project_selection(arguments, x_BE, tiling)
    y_BE, state_BEN = advance(arguments, parts_PBM, x_BE, first["z"], tiling)
    residual_BD = project_out(arguments, y_BE, tiling)
    return Mamba1StepOutput(residual=residual_BD, window=first["new_window"], state=state_BEN)


def _many_rows(arguments: StepArguments, tiling: Tiling) -> Mamba1StepOutput:
    """In-, x- and out-projection by XLA, the rest by kernels that read x and z where the in-projection left them."""
    product = product_by_column if tiling.by_column else product_by_row
    xz_BF = product(normalized(arguments), arguments.in_proj)
    weights = {"weight": arguments.conv_weight, "bias": arguments.conv_bias}
    x_BE, window_BWE = calls.convolve(xz_BF, 0, **weights, window=arguments.window, tile=tiling.convolve)
    selection_BM = product(x_BE, arguments.x_proj)
    dt_BE = None
    if tiling.by_column:
        # Then a program may have few rows: its bytes are of the state, and none of a matrix that all programs read.
        dt_BE = product(selection_BM[:, : arguments.dt_proj.shape[0]], arguments.dt_proj)
    y_BE, state_BEN = advance(arguments, selection_BM[None], x_BE, xz_BF, tiling, dt_BE=dt_BE)
    residual_BD = arguments.residual + product(y_BE, arguments.out_proj).astype(jnp.float32)
    return Mamba1StepOutput(residual=residual_BD, window=window_BWE, state=state_BEN)


def project_in(arguments: StepArguments, tiling: Tiling) -> dict[str, jax.Array]:
    """What convolution and SiLU make of x, z, the new window, and parts of the x-projection if it is made here."""
    tile, has_selection = tiling.project_in, tiling.project_selection is None
    # The x-projection within this kernel reads its matrix by rows.
    assert not (has_selection and tiling.by_column)
    constants = _of_product(arguments, tile, tiling, EPS=arguments.eps, HAS_SELECTION=has_selection)
    x_type = like(arguments.in_proj, constants.ROWS, constants.E)
    parts = (constants.blocks, constants.ROWS, constants.selection) if has_selection else (1,)
    inputs = {"residual": arguments.residual, "norm_scale": arguments.norm_scale}
    inputs["weight"] = _read(arguments.in_proj, tiling)
    inputs |= {name: getattr(arguments, name) for name in ("conv_weight", "conv_bias", "window")}
    inputs["x_proj"] = _read(arguments.x_proj, tiling)
    outputs = {"x": x_type, "z": x_type, "new_window": same(arguments.window), "parts": float32(*parts)}
    shape = launch_of(tile, 2 * constants.blocks, new_window="window")
    return launch.run(calls.kernels(f"{_FOLDER}.products").project_in, inputs, outputs, constants, shape)


def project_selection(arguments: StepArguments, x_BE: jax.Array, tiling: Tiling) -> jax.Array:
    """The x-projection in parts of its sum, (P, B, R + 2 N), float32."""
    tile = tiling.project_selection
    assert tile is not None
    constants = _of_product(arguments, tile, tiling, PARTS=tile.parts)
    outputs = {"parts": float32(tile.parts, constants.ROWS, constants.selection)}
    programs = tile.parts * -(-constants.selection // tile.columns)
    inputs = {"x": x_BE, "weight": _read(arguments.x_proj, tiling)}
    kernel = calls.kernels(f"{_FOLDER}.products").project_selection
    return launch.run(kernel, inputs, outputs, constants, launch_of(tile, programs))["parts"]


def advance(
    arguments: StepArguments,
    parts_PBM: jax.Array,
    x_BE: jax.Array,
    z: jax.Array,
    tiling: Tiling,
    *,
    dt_BE: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated output y (B, E) and the new state; z is (B, E), or the in-projection (B, 2 E) whose second half it is.

    Args:
        arguments: of the step.
        parts_PBM: the x-projection in parts of its sum.
        x_BE: the input of the recurrence.
        z: the gate.
        tiling: of the kernels.
        dt_BE: the step size before bias and softplus; None lets the kernel project it.
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
        BY_COLUMN=tiling.by_column,
        A_IS_LOG=tiling.by_column,
        HAS_DT=dt_BE is not None,
    )
    inputs = {"parts": parts_PBM, "dt_proj": _read(arguments.dt_proj, tiling) if dt_BE is None else dt_BE}
    # Within a loop, what XLA makes of A_log would be made, by another launch, for every token.
    inputs |= {"dt_bias": arguments.dt_bias, "A": arguments.A_log if tiling.by_column else rates(arguments)}
    inputs["D"] = arguments.D
    inputs |= {"x": x_BE, "z": z, "state": arguments.state}
    outputs = {"y": same(x_BE), "new_state": same(arguments.state)}
    programs = -(-sizes.ROWS // tile.rows) * constants.blocks
    shape = Launch(programs=programs, warps=tile.warps, in_place={"new_state": "state"})
    results = launch.run(calls.kernels(f"{_FOLDER}.recurrence").advance, inputs, outputs, constants, shape)
    return results["y"], results["new_state"]


def project_out(arguments: StepArguments, y_BE: jax.Array, tiling: Tiling) -> jax.Array:
    """The residual stream after the block."""
    tile = tiling.project_out
    constants = _of_product(arguments, tile, tiling)
    inputs = {"residual": arguments.residual, "y": y_BE, "weight": _read(arguments.out_proj, tiling)}
    outputs = {"new_residual": same(arguments.residual)}
    shape = launch_of(tile, -(-constants.D // tile.columns), new_residual="residual")
    kernel = calls.kernels(f"{_FOLDER}.products").project_out
    return launch.run(kernel, inputs, outputs, constants, shape)["new_residual"]


def _sizes(arguments: StepArguments) -> Sizes:
    """The sizes of a call."""
    rows, width = arguments.residual.shape
    channels, states = arguments.A_log.shape
    rank, taps = arguments.dt_proj.shape[0], arguments.conv_weight.shape[0]
    return Sizes(ROWS=rows, D=width, E=channels, N=states, R=rank, K=taps)


def _read(matrix: jax.Array, tiling: Tiling) -> jax.Array:
    """A matrix as kernels of the tiling read it."""
    return by_column(matrix) if tiling.by_column else matrix


def _of_product(arguments: StepArguments, tile: Tile, tiling: Tiling, **options: Any) -> ProjectionConstants:
    """What a kernel that multiplies is compiled for."""
    sizes: dict[str, Any] = vars(_sizes(arguments))
    return ProjectionConstants(**sizes, **tile.constants(sizes["ROWS"], is_by_column=tiling.by_column), **options)
