"""The Mamba-2 step as three Triton kernels.

`project_in` does norm, in-projections, convolutions and SiLU, `advance` the recurrence and the gate, and `project_out`
normalises, projects, and adds to the residual stream. Windows, state and residual stream are written in place. All read
matrices by columns. With many rows XLA's products do the projections.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.triton import calls, launch
from pallas_kernels.common.triton.calls import float32, launch_of, like, same
from pallas_kernels.common.triton.launch import Launch
from pallas_kernels.common.triton.tiles import MOST_ROWS, Tile, by_column, product_by_column
from pallas_kernels.mamba2_step.arguments import Mamba2Carry, StepArguments
from pallas_kernels.mamba2_step.triton.constants import ProjectionConstants, Sizes, StepConstants
from pallas_kernels.mamba2_step.triton.tilings import RecurrenceTile, Tiling, default_tiling
from pallas_kernels.mamba2_step.xla.op import gated_norm, normalized

_FOLDER = "pallas_kernels.mamba2_step.triton"
_RING = ("ring_x", "ring_B", "ring_dt")


def mamba2_step(arguments: StepArguments, *, tiling: Tiling | None = None) -> Mamba2Carry:
    """See `pallas_kernels.mamba2_step.api.mamba2_step`; `tiling` replaces the default one.

    Raises:
        NotImplementedError: the target is not a CUDA GPU of compute capability 8.0 or more, triton is not installed, an
            argument is float64, the compute dtype is neither bfloat16 nor float32, the residual stream is not float32,
            a size is not known, or the gated norm takes parts of heads together.
    """
    if arguments.group_size % arguments.state.shape[2]:
        raise NotImplementedError(
            f"{arguments.op}: 'triton' normalises whole heads of {arguments.state.shape[2]} channels, got "
            f"group_size={arguments.group_size}"
        )
    calls.decline(arguments, "triton")
    rows, width = arguments.residual.shape
    tiling = tiling or default_tiling(rows, width=width)
    return (_few_rows if rows <= MOST_ROWS else _many_rows)(arguments, tiling)


def _few_rows(arguments: StepArguments, tiling: Tiling) -> Mamba2Carry:
    """Every projection by a kernel."""
    first = project_in(arguments, tiling.project_in)
    inputs = {name: first[name] for name in ("x", "BC", "dt", "z")}
    step = advance(arguments, inputs, tiling.advance, output=same(first["x"]))
    residual_BD = project_out(arguments, step["y"], step["squares"], tiling.project_out)
    windows = {"window": first["new_window"], "BC_window": first["new_BC_window"]}
    return Mamba2Carry(residual=residual_BD, **windows, **_carried(step))


def _many_rows(arguments: StepArguments, tiling: Tiling) -> Mamba2Carry:
    """The projections by XLA, the rest by kernels that read x and z where the in-projection left them."""
    u_BD, channels = normalized(arguments), arguments.out_proj.shape[0]
    zx_BF, BC_BM = (product_by_column(u_BD, matrix) for matrix in (arguments.in_proj, arguments.BC_proj))
    # Of two products of the same rows XLA makes one, for which it joins their matrices for every token.
    dt_BH = product_by_column(jax.lax.optimization_barrier(u_BD), arguments.dt_proj)
    x_BE, window_BWE = calls.convolve(
        zx_BF,
        channels,
        weight=arguments.conv_weight,
        bias=arguments.conv_bias,
        window=arguments.window,
        tile=tiling.convolve,
    )
    BC_BM, window_BWM = calls.convolve(
        BC_BM,
        0,
        weight=arguments.BC_conv_weight,
        bias=arguments.BC_conv_bias,
        window=arguments.BC_window,
        tile=tiling.convolve,
    )
    inputs = {"x": x_BE, "BC": BC_BM, "dt": dt_BH, "z": zx_BF}
    step = advance(arguments, inputs, tiling.advance, output=float32(*x_BE.shape))
    output_BD = product_by_column(gated_norm(arguments, step["y"]), arguments.out_proj)
    residual_BD = arguments.residual + output_BD.astype(jnp.float32)
    return Mamba2Carry(residual=residual_BD, window=window_BWE, BC_window=window_BWM, **_carried(step))


def _carried(step: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The state and the ring that `advance` leaves, by their names in `Mamba2Carry`."""
    return {name.removeprefix("new_"): array for name, array in step.items() if name.startswith("new_")}


def project_in(arguments: StepArguments, tile: Tile) -> dict[str, jax.Array]:
    """What convolutions and SiLU make of x, and of B and C; z, dt, and the new windows."""
    constants = _of_product(arguments, tile, EPS=arguments.eps)
    inputs = {"norm_scale": arguments.norm_scale, "residual": arguments.residual}
    inputs |= {name: by_column(getattr(arguments, name)) for name in ("in_proj", "BC_proj", "dt_proj")}
    names = ("conv_weight", "conv_bias", "BC_conv_weight", "BC_conv_bias", "window", "BC_window")
    inputs |= {name: getattr(arguments, name) for name in names}
    columns = {"z": constants.E, "x": constants.E, "BC": constants.BC, "dt": constants.H}
    outputs = {name: like(arguments.in_proj, constants.ROWS, size) for name, size in columns.items()}
    outputs |= {"new_window": same(arguments.window), "new_BC_window": same(arguments.BC_window)}
    programs = 2 * constants.blocks + constants.BC_blocks + constants.dt_blocks
    shape = launch_of(tile, programs, new_window="window", new_BC_window="BC_window")
    return launch.run(calls.kernels(f"{_FOLDER}.products").project_in, inputs, outputs, constants, shape)


def advance(
    arguments: StepArguments, inputs: dict[str, jax.Array], tile: RecurrenceTile, *, output: jax.ShapeDtypeStruct
) -> dict[str, jax.Array]:
    """The gated output y (B, E), sums of its squares, and the new state and ring.

    Args:
        arguments: of the step.
        inputs: x, BC, dt and z; z is (B, E), or the in-projection (B, 2 E) whose first half it is.
        tile: of the kernel.
        output: y; it is multiplied with the scale of the norm, but for many rows.
    """
    sizes = _sizes(arguments)
    constants = StepConstants(
        **vars(sizes),
        CHANNELS=tile.channels,
        DT_LEAST=arguments.dt_limit[0],
        DT_GREATEST=arguments.dt_limit[1],
        SKIPS=arguments.D.size // sizes.H,
        Z_STRIDE=inputs["z"].shape[1],
        IS_SCALED=sizes.ROWS <= MOST_ROWS,
        LENGTH=0 if arguments.ring_x is None else arguments.ring_x.shape[1],
    )
    kernels = calls.kernels(f"{_FOLDER}.recurrence")
    inputs = inputs | {"scale": arguments.gated_norm_scale}
    inputs |= {name: getattr(arguments, name) for name in ("dt_bias", "A_log", "D", "state")}
    outputs = {"y": output, "squares": float32(sizes.ROWS, sizes.H * constants.pieces)}
    carried = {name: array for name in ("state", *_RING) if (array := getattr(arguments, name)) is not None}
    outputs |= {f"new_{name}": same(array) for name, array in carried.items()}
    in_place = {f"new_{name}": name for name in carried}
    programs = sizes.ROWS * sizes.H * constants.pieces
    shape = Launch(programs=programs, warps=tile.warps, in_place=in_place)
    if arguments.ring_length is None:
        return launch.run(kernels.advance, inputs, outputs, constants, shape)
    rings = {name: getattr(arguments, name) for name in (*_RING, "ring_length")}
    step = launch.run(kernels.advance_ring, rings | inputs, outputs, constants, shape)
    # Kernels of other programs may still read the lengths when one ends: XLA moves them on.
    return step | {"new_ring_length": (arguments.ring_length + 1) % constants.LENGTH}


def project_out(arguments: StepArguments, y_BE: jax.Array, squares: jax.Array, tile: Tile) -> jax.Array:
    """The residual stream after the block."""
    constants = _of_product(arguments, tile, EPS=arguments.gated_norm_eps, SQUARES=squares.shape[1])
    inputs = {"residual": arguments.residual, "y": y_BE, "squares": squares, "weight": by_column(arguments.out_proj)}
    outputs = {"new_residual": same(arguments.residual)}
    shape = launch_of(tile, -(-constants.D // tile.columns), new_residual="residual")
    kernel = calls.kernels(f"{_FOLDER}.products").project_out
    return launch.run(kernel, inputs, outputs, constants, shape)["new_residual"]


def _of_product(arguments: StepArguments, tile: Tile, **options: Any) -> ProjectionConstants:
    """What a kernel that multiplies is compiled for."""
    sizes: dict[str, Any] = vars(_sizes(arguments))
    return ProjectionConstants(**sizes, **tile.constants(sizes["ROWS"], is_by_column=True), **options)


def _sizes(arguments: StepArguments) -> Sizes:
    """The sizes of a call."""
    rows, heads, width, states = arguments.state.shape
    return Sizes(
        ROWS=rows,
        D=arguments.residual.shape[1],
        H=heads,
        P=width,
        N=states,
        G=arguments.BC_proj.shape[2],
        K=arguments.conv_weight.shape[0],
        GROUP=arguments.group_size,
    )
