"""The Mamba-1 step as Triton kernels: what a few rows cost is the weights' way from memory, and every launch.

`project_in` does norm, in-projection, convolution and SiLU, a product in parts the x-projection, `advance` adds these
and advances the recurrence, and `project_out` adds to the residual stream. Of a few rows `advance` projects dt as well.
More rows than one are normalised before, by a kernel of its own, and of many the out-projection comes in parts too.
Window, state and residual stream are written in place. All read matrices by columns.
"""

from typing import Any

import jax

from pallas_kernels.common.triton import calls, launch
from pallas_kernels.common.triton.calls import launch_of, matrices, rounded, same
from pallas_kernels.common.triton.launch import Launch
from pallas_kernels.common.triton.tiles import Tile, next_power_of_two
from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, StepArguments
from pallas_kernels.mamba1_step.triton.constants import ProjectionConstants, Sizes, StepConstants
from pallas_kernels.mamba1_step.triton.tilings import Tiling, default_tiling

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
    first = project_in(arguments, tiling.project_in)
    parts_PBM, dt_BE = calls.multiply_in_parts(arguments, first["x"], "x_proj", tiling.project_selection), None
    if tiling.project_dt is not None:
        # A program that added the parts itself would wait for them, and many would add the same.
        parts_PBM = calls.sum_parts(arguments, parts_PBM)[None]
        dt_BE = project_dt(arguments, parts_PBM[0], tiling.project_dt)
    y_BE, state_BEN = advance(arguments, parts_PBM, first["x"], first["z"], tiling, dt_BE=dt_BE)
    residual_BD = project_out(arguments, y_BE, tiling.project_out)
    return Mamba1StepOutput(residual=residual_BD, window=first["new_window"], state=state_BEN)


def project_in(arguments: StepArguments, tile: Tile) -> dict[str, jax.Array]:
    """What convolution and SiLU make of x, z, and the new window."""
    constants = _of_product(arguments, tile, EPS=arguments.eps)
    stream = arguments.residual if constants.M == 1 else calls.normalize(arguments)
    inputs = {"stream": stream, "norm_scale": arguments.norm_scale} | matrices(arguments, weight="in_proj")
    inputs |= {name: getattr(arguments, name) for name in ("conv_weight", "conv_bias", "window")}
    x_type = rounded(arguments, constants.ROWS, constants.E)
    outputs = {"x": x_type, "z": x_type, "new_window": same(arguments.window)}
    shape = launch_of(tile, 2 * constants.blocks * constants.row_blocks, new_window="window")
    return launch.run(calls.kernels(f"{_FOLDER}.products").project_in, inputs, outputs, constants, shape)


def project_dt(arguments: StepArguments, selection_BM: jax.Array, tile: Tile) -> jax.Array:
    """The step size (B, E) before bias and softplus, from the x-projection."""
    constants = _of_product(arguments, tile)
    inputs = {"selection": selection_BM} | matrices(arguments, weight="dt_proj")
    outputs = {"dt": rounded(arguments, constants.ROWS, constants.E)}
    kernel = calls.kernels(f"{_FOLDER}.products").project_dt
    return launch.run(kernel, inputs, outputs, constants, launch_of(tile, constants.blocks * constants.row_blocks))[
        "dt"
    ]


def advance(
    arguments: StepArguments,
    parts_PBM: jax.Array,
    x_BE: jax.Array,
    z_BE: jax.Array,
    tiling: Tiling,
    *,
    dt_BE: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated output y (B, E) and the new state.

    Args:
        arguments: of the step.
        parts_PBM: the x-projection in parts of its sum.
        x_BE: the input of the recurrence.
        z_BE: the gate.
        tiling: of the kernels.
        dt_BE: the step size before bias and softplus; None lets the kernel project it, for a row a program.
    """
    tile, sizes, parts = tiling.advance, _sizes(arguments), parts_PBM.shape[0]
    assert tile.rows == 1 or (parts == 1 and dt_BE is not None)
    # The more terms at a time, the less often a program waits for memory.
    most = max(_VALUES // next_power_of_two(parts), 16)
    constants = StepConstants(
        **vars(sizes),
        M=tile.rows,
        CHANNELS=tile.channels,
        RANK=min(max(next_power_of_two(sizes.R), 16), most),
        PARTS=parts,
        HAS_DT=dt_BE is not None,
    )
    inputs = {"parts": parts_PBM} | matrices(arguments, dt_proj="dt_proj")
    inputs |= {} if dt_BE is None else {"dt_proj": dt_BE}
    inputs |= {name: getattr(arguments, name) for name in ("dt_bias", "A_log", "D")}
    inputs |= {"x": x_BE, "z": z_BE, "state": arguments.state}
    outputs = {"y": same(x_BE), "new_state": same(arguments.state)}
    programs = -(-sizes.ROWS // tile.rows) * constants.blocks
    shape = Launch(programs=programs, warps=tile.warps, in_place={"new_state": "state"})
    results = launch.run(calls.kernels(f"{_FOLDER}.recurrence").advance, inputs, outputs, constants, shape)
    return results["y"], results["new_state"]


def project_out(arguments: StepArguments, y_BE: jax.Array, tile: Tile) -> jax.Array:
    """The residual stream after the block."""
    if tile.parts > 1:
        return calls.add_to_residual(arguments, calls.multiply_in_parts(arguments, y_BE, "out_proj", tile))
    constants = _of_product(arguments, tile)
    inputs = {"residual": arguments.residual, "y": y_BE} | matrices(arguments, weight="out_proj")
    outputs = {"new_residual": same(arguments.residual)}
    programs = -(-constants.D // tile.columns) * constants.row_blocks
    shape = launch_of(tile, programs, new_residual="residual")
    kernel = calls.kernels(f"{_FOLDER}.products").project_out
    return launch.run(kernel, inputs, outputs, constants, shape)["new_residual"]


def _sizes(arguments: StepArguments) -> Sizes:
    """The sizes of a call."""
    rows, width = arguments.residual.shape
    channels, states = arguments.A_log.shape
    rank, taps = arguments.dt_proj.shape[0], arguments.conv_weight.shape[0]
    return Sizes(ROWS=rows, D=width, E=channels, N=states, R=rank, K=taps)


def _of_product(arguments: StepArguments, tile: Tile, **options: Any) -> ProjectionConstants:
    """What a kernel that multiplies is compiled for."""
    sizes = _sizes(arguments)
    return ProjectionConstants(**vars(sizes), **tile.constants(sizes.ROWS, arguments.in_proj), **options)
