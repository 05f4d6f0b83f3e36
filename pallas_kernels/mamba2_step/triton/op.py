"""The Mamba-2 step as three Triton kernels.

`project_in` does norm, in-projections, convolutions and SiLU, `advance` the recurrence and the gate, and `project_out`
normalises, projects, and adds to the residual stream. More than one row is normalised before, by a kernel of its own,
and of many the out-projection comes in parts of its sum, which another kernel adds. Windows, state and residual stream
are written in place. All read matrices by columns.
"""

from typing import Any

import jax

from pallas_kernels.common.triton import calls, launch
from pallas_kernels.common.triton.calls import float32, launch_of, matrices, rounded, same
from pallas_kernels.common.triton.launch import Launch
from pallas_kernels.common.triton.tiles import Tile
from pallas_kernels.mamba2_step.arguments import Mamba2Carry, StepArguments
from pallas_kernels.mamba2_step.triton.constants import ProjectionConstants, Sizes, StepConstants
from pallas_kernels.mamba2_step.triton.tilings import RecurrenceTile, Tiling, default_tiling

_FOLDER = "pallas_kernels.mamba2_step.triton"


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
    tiling = tiling or default_tiling(rows, width=width, has_ring=arguments.ring_x is not None)
    first = project_in(arguments, tiling.project_in)
    inputs = {name: first[name] for name in ("x", "BC", "dt", "z")}
    step = advance(arguments, inputs, tiling.advance)
    residual_BD = project_out(arguments, step["y"], step["squares"], tiling.project_out)
    windows = {"window": first["new_window"], "BC_window": first["new_BC_window"]}
    return Mamba2Carry(residual=residual_BD, **windows, **_carried(step))


def _carried(step: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The state and the ring that `advance` leaves, by their names in `Mamba2Carry`."""
    return {name.removeprefix("new_"): array for name, array in step.items() if name.startswith("new_")}


def project_in(arguments: StepArguments, tile: Tile) -> dict[str, jax.Array]:
    """What convolutions and SiLU make of x, and of B and C; z, dt, and the new windows."""
    constants = _of_product(arguments, tile, EPS=arguments.eps)
    stream = arguments.residual if constants.M == 1 else calls.normalize(arguments)
    inputs = {"stream": stream, "norm_scale": arguments.norm_scale}
    inputs |= matrices(arguments, in_proj="in_proj", BC_proj="BC_proj", dt_proj="dt_proj")
    names = ("conv_weight", "conv_bias", "BC_conv_weight", "BC_conv_bias", "window", "BC_window")
    inputs |= {name: getattr(arguments, name) for name in names}
    columns = {"z": constants.E, "x": constants.E, "BC": constants.BC, "dt": constants.H}
    outputs = {name: rounded(arguments, constants.ROWS, size) for name, size in columns.items()}
    outputs |= {"new_window": same(arguments.window), "new_BC_window": same(arguments.BC_window)}
    shape = launch_of(tile, constants.programs, new_window="window", new_BC_window="BC_window")
    return launch.run(calls.kernels(f"{_FOLDER}.products").project_in, inputs, outputs, constants, shape)


def advance(arguments: StepArguments, inputs: dict[str, jax.Array], tile: RecurrenceTile) -> dict[str, jax.Array]:
    """The gated output y (B, E) times the scale of its norm, sums of its squares, and the new state and ring.

    Args:
        arguments: of the step.
        inputs: x, BC, dt and z.
        tile: of the kernel.
    """
    sizes = _sizes(arguments)
    constants = StepConstants(
        **vars(sizes),
        CHANNELS=tile.channels,
        DT_LEAST=arguments.dt_limit[0],
        DT_GREATEST=arguments.dt_limit[1],
        SKIPS=arguments.D.size // sizes.H,
        LENGTH=0 if arguments.ring_x is None else arguments.ring_x.shape[1],
    )
    kernels = calls.kernels(f"{_FOLDER}.recurrence")
    learned = {"scale": arguments.gated_norm_scale}
    learned |= {name: getattr(arguments, name) for name in ("dt_bias", "A_log", "D")}
    state = {"state": arguments.state}
    outputs = {"y": same(inputs["x"]), "squares": float32(sizes.ROWS, sizes.H * constants.pieces)}
    outputs["new_state"] = same(arguments.state)
    programs = sizes.ROWS * sizes.H * constants.pieces
    if arguments.ring_length is None:
        shape = Launch(programs=programs, warps=tile.warps, registers=tile.registers, in_place={"new_state": "state"})
        return launch.run(kernels.advance, inputs | learned | state, outputs, constants, shape)
    ring = {name: getattr(arguments, name) for name in ("ring_x", "ring_B", "ring_dt", "ring_length")}
    scored = _score(arguments, inputs["BC"], constants)
    outputs |= {f"new_{name}": same(ring[name]) for name in ("ring_x", "ring_dt")}
    in_place = {name: name.removeprefix("new_") for name in outputs if name.startswith("new_")}
    ring |= {"ring_B": scored["new_ring_B"], "scores": scored["scores"]}
    shape = Launch(programs=programs, warps=tile.warps, registers=tile.registers, in_place=in_place)
    step = launch.run(kernels.advance_ring, learned | ring | state | inputs, outputs, constants, shape)
    # Kernels of other programs may still read the lengths when one ends: XLA moves them on.
    length_B = (arguments.ring_length + 1) % constants.LENGTH
    return step | {"new_ring_B": scored["new_ring_B"], "new_ring_length": length_B}


def _score(arguments: StepArguments, BC_BM: jax.Array, constants: StepConstants) -> dict[str, jax.Array]:
    """What all heads of a group would compute alike: B C of the tokens of the ring; and the ring with the new B."""
    assert arguments.ring_B is not None
    assert arguments.ring_length is not None
    inputs = {"ring_B": arguments.ring_B, "ring_length": arguments.ring_length, "BC": BC_BM}
    outputs = {"scores": float32(constants.ROWS, constants.G, constants.LENGTH), "new_ring_B": same(arguments.ring_B)}
    shape = Launch(programs=constants.ROWS * constants.G, warps=1, in_place={"new_ring_B": "ring_B"})
    return launch.run(calls.kernels(f"{_FOLDER}.recurrence").score_ring, inputs, outputs, constants, shape)


def project_out(arguments: StepArguments, y_BE: jax.Array, squares: jax.Array, tile: Tile) -> jax.Array:
    """The residual stream after the block."""
    constants = _of_product(arguments, tile, EPS=arguments.gated_norm_eps, SQUARES=squares.shape[1], PARTS=tile.parts)
    kernels, programs = calls.kernels(f"{_FOLDER}.products"), -(-constants.D // tile.columns) * constants.row_blocks
    inputs = {"y": y_BE, "squares": squares} | matrices(arguments, weight="out_proj")
    if tile.parts > 1:
        outputs = {"parts": float32(tile.parts, *arguments.residual.shape)}
        shape = launch_of(tile, programs * tile.parts)
        results = launch.run(kernels.project_out_in_parts, inputs, outputs, constants, shape)
        return calls.add_to_residual(arguments, results["parts"])
    inputs = {"residual": arguments.residual} | inputs
    outputs = {"new_residual": same(arguments.residual)}
    shape = launch_of(tile, programs, new_residual="residual")
    return launch.run(kernels.project_out, inputs, outputs, constants, shape)["new_residual"]


def _of_product(arguments: StepArguments, tile: Tile, **options: Any) -> ProjectionConstants:
    """What a kernel that multiplies is compiled for."""
    sizes: dict[str, Any] = vars(_sizes(arguments))
    return ProjectionConstants(**sizes, **tile.constants(sizes["ROWS"], arguments.in_proj), **options)


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
