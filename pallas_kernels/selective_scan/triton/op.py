"""The selective scan as Triton kernels: for GPUs before Hopper, and for arguments that the Mosaic GPU kernels decline.

The forward kernel keeps the state in registers and, when a gradient will be needed, stores it at the start of every
chunk of 32 or 64 tokens; the backward kernel recomputes the others from there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.channels import gradient_of_matrix, group_count
from pallas_kernels.common.checks import decline_double_precision, decline_symbolic_sizes
from pallas_kernels.common.derivatives import differentiable_op, no_forward_mode
from pallas_kernels.selective_scan.arguments import ScanArguments, ScanOutput
from pallas_kernels.selective_scan.kernel_inputs import MAX_STATES
from pallas_kernels.selective_scan.triton import call as triton_call
from pallas_kernels.selective_scan.triton.constants import Constants

_FOLDER = "pallas_kernels.selective_scan.triton"
_LANES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program works on at a time.

    Attributes:
        tokens: of a tile, a power of two.
        channels: of a program, a power of two.
        warps: of a program.
    """

    tokens: int
    channels: int
    warps: int


# By the number of states: what compiles without spilling registers, or (128 and 256 states) hardly.
_BACKWARD_TILES = {
    1: Tile(tokens=8, channels=64, warps=2),
    2: Tile(tokens=8, channels=64, warps=2),
    4: Tile(tokens=4, channels=64, warps=2),
    8: Tile(tokens=4, channels=64, warps=4),
    16: Tile(tokens=4, channels=32, warps=2),
    32: Tile(tokens=2, channels=64, warps=4),
    64: Tile(tokens=2, channels=64, warps=8),
    128: Tile(tokens=1, channels=64, warps=8),
    256: Tile(tokens=1, channels=32, warps=8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the kernels cut the arguments up; sizes are powers of two.

    Attributes:
        lanes_per_channel: that share a channel.
        states: of a channel that a lane holds.
        chunk: tokens from one stored state to the next.
        forward, backward: tiles of the kernels.
    """

    lanes_per_channel: int
    states: int
    chunk: int
    forward: Tile
    backward: Tile


def selective_scan(arguments: ScanArguments, *, tiling: Tiling | None = None) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`; `tiling` replaces the default one.

    Raises:
        NotImplementedError: the target is not a CUDA GPU of compute capability 8.0 or more, jax-triton is not
            installed, A is complex, N is over 256, an argument is float64, or a size is not known.
    """
    op, A = arguments.op, arguments.A
    decline_double_precision("triton", arguments)
    if jnp.issubdtype(A.dtype, jnp.complexfloating):
        raise NotImplementedError(f"{op}: 'triton' takes a real A only, got {A.dtype}")
    if A.shape[1] > MAX_STATES:
        raise NotImplementedError(f"{op}: 'triton' takes at most {MAX_STATES} states, got {A.shape[1]}")
    decline_symbolic_sizes(op, "triton", arguments.x, A)
    triton_call.import_kernels(op, f"{_FOLDER}.forward")
    batch, _, channels = arguments.x.shape
    return _scan(tiling or default_tiling(A.shape[1], batch_channels=batch * channels), arguments)


def default_tiling(states: int, *, batch_channels: int) -> Tiling:
    """The tiling for N states.

    A thread has 255 registers, and the backward pass keeps several copies of a tile there. More channels a program:
    fewer partial sums of the gradients of B and C (8 N / channels bytes a token and channel). Fewer channels: more
    programs to fill the chip with.
    """
    states = _next_power_of_two(states)
    lanes = min(max(states // 4, 1), 16)
    channels = max(_LANES // lanes, 8)
    # A thread holds at most 32 values, tokens x states of a lane, of a tile of the forward pass.
    tokens = max(min(32 * lanes // states, 8), 1)
    backward = _BACKWARD_TILES[states]
    # So many channels fill the chip also in wider programs.
    if states == 16 and batch_channels >= 2**15:
        backward = Tile(tokens=4, channels=64, warps=4)
    return Tiling(
        lanes_per_channel=lanes,
        states=states // lanes,
        chunk=64 if backward.tokens >= 4 else 32,
        forward=Tile(tokens=tokens, channels=channels, warps=channels * lanes // _LANES),
        backward=backward,
    )


def _next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _scan_outputs(tiling: Tiling, arguments: ScanArguments) -> ScanOutput:
    """The result of a kernel that stores no checkpoints, for calls without gradients."""
    return _run_forward(tiling, arguments, has_checkpoints=False)[0]


def _scan_forward(tiling: Tiling, arguments: ScanArguments) -> tuple[ScanOutput, jax.Array | None]:
    """The result, and the states (B, chunks, E, N) before each chunk of `tiling.chunk` tokens, float32."""
    return _run_forward(tiling, arguments, has_checkpoints=True)


def _run_forward(
    tiling: Tiling, arguments: ScanArguments, *, has_checkpoints: bool
) -> tuple[ScanOutput, jax.Array | None]:
    """The result, and the states at the starts of chunks."""
    constants = _constants(tiling, tiling.forward, arguments, has_checkpoints=has_checkpoints)
    state = (constants.CHANNELS, constants.STATES)
    outputs = {
        "y": jax.ShapeDtypeStruct(arguments.x.shape, arguments.x.dtype),
        "final_state": _float32(constants.BATCH, *state),
        "checkpoints": _float32(constants.BATCH, constants.chunks, *state) if has_checkpoints else None,
    }
    inputs = _inputs(arguments) | {"initial_state": _widened(arguments.initial_state)}
    results = _call("forward", arguments.op, inputs, outputs, constants, warps=tiling.forward.warps)
    return ScanOutput(y=results["y"], final_state=results["final_state"]), results.get("checkpoints")


def _scan_backward(tiling: Tiling, arguments: ScanArguments, checkpoints: jax.Array, cotangents: ScanOutput) -> Arrays:
    """Gradients of all floating arguments that were given, by name.

    The kernel completes the gradients of x, dt, z and the initial state. Of every other one it writes a share for each
    batch row or block of channels (see `_gradient_types`), and `_summed` adds the shares up.
    """
    inputs = _inputs(arguments)
    inputs |= {"checkpoints": checkpoints, "dy": cotangents.y, "dfinal_state": cotangents.final_state}
    constants = _constants(tiling, tiling.backward, arguments, has_checkpoints=True)
    outputs = _gradient_types(constants, arguments)
    results = _call("backward", arguments.op, inputs, outputs, constants, warps=tiling.backward.warps)
    operands, _ = arguments.operands()
    gradients = {name: results[f"d{name}"] for name in operands.arrays() if f"d{name}" in results}
    return {name: _summed(gradient, name, getattr(arguments, name)) for name, gradient in gradients.items()}


def _gradient_types(constants: Constants, arguments: ScanArguments) -> dict[str, jax.ShapeDtypeStruct | None]:
    """What the backward kernel writes: gradients of constants by batch row, of matrices by block of channels."""
    given, batch = arguments.arrays(), constants.BATCH
    of_states = _float32(batch, constants.CHANNELS, constants.STATES)
    of_matrix = _float32(constants.blocks, batch, constants.LENGTH, constants.GROUPS, constants.STATES)

    def like(name: str) -> jax.ShapeDtypeStruct | None:
        return jax.ShapeDtypeStruct(given[name].shape, given[name].dtype) if name in given else None

    types = {f"d{name}": like(name) for name in ("x", "dt", "z")}
    types["dA"] = of_states
    types["dB"] = of_matrix if constants.B_GROUPS else of_states
    types["dC"] = of_matrix if constants.C_GROUPS else of_states
    types |= {f"d{name}": _float32(batch, constants.CHANNELS) if name in given else None for name in ("D", "dt_bias")}
    types["dinitial_state"] = of_states
    types["scratch"] = _float32(constants.programs, constants.CHUNK, constants.kept_states)
    return types


_scan = differentiable_op(
    _scan_outputs,
    forward=_scan_forward,
    backward=_scan_backward,
    tangent=no_forward_mode("selective_scan", "triton"),
)


def _summed(gradient: jax.Array, name: str, argument: jax.Array) -> jax.Array:
    """A gradient from what the kernel has computed of it, row by row or block by block."""
    if name in ("B", "C") and argument.ndim > 2:
        return gradient_of_matrix(gradient.sum(axis=0), argument)
    return gradient.sum(axis=0) if name in ("A", "B", "C", "D", "dt_bias") else gradient


def _call(
    kernel: str,
    op: str,
    inputs: dict[str, jax.Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct | None],
    constants: Constants,
    *,
    warps: int,
) -> dict[str, jax.Array]:
    """Runs the kernel of this name from the module of this name, a program for each batch row and block of channels.

    Inputs and outputs are in the order of the kernel's parameters; returns the outputs that are not None.
    """
    module = triton_call.import_kernels(op, f"{_FOLDER}.{kernel}")
    return triton_call.call(
        getattr(module, kernel),
        inputs,
        outputs,
        {"constants": constants},
        programs=constants.programs,
        warps=warps,
        name=f"selective_scan_{kernel}",
    )


def _inputs(arguments: ScanArguments) -> dict[str, jax.Array | None]:
    """`tiles.Inputs`, which both kernels take first. Matrices are in float32, which spares the kernels a conversion."""
    inputs = {name: getattr(arguments, name) for name in ("x", "dt", "z")}
    inputs |= {name: _widened(getattr(arguments, name)) for name in ("A", "B", "C", "D", "dt_bias")}
    return inputs | {"segment_ids": arguments.segment_ids}


def _constants(tiling: Tiling, tile: Tile, arguments: ScanArguments, *, has_checkpoints: bool) -> Constants:
    """What a kernel is compiled for: sizes and options of the call, and `tile`, which is one of the two of `tiling`."""
    batch, length, channels = arguments.x.shape
    return Constants(
        BATCH=batch,
        LENGTH=length,
        CHANNELS=channels,
        STATES=arguments.A.shape[1],
        GROUPS=group_count(arguments.B, arguments.C),
        B_GROUPS=_groups(arguments.B),
        C_GROUPS=_groups(arguments.C),
        SOFTPLUS=arguments.dt_softplus,
        ZOH=arguments.discretization == "zoh",
        HAS_D=arguments.D is not None,
        HAS_Z=arguments.z is not None,
        HAS_BIAS=arguments.dt_bias is not None,
        HAS_SEGMENTS=arguments.segment_ids is not None,
        HAS_INITIAL=arguments.initial_state is not None,
        HAS_CHECKPOINTS=has_checkpoints,
        T=tile.tokens,
        R=tiling.states,
        E=tile.channels,
        P=tiling.lanes_per_channel,
        CHUNK=tiling.chunk // tile.tokens,
    )


def _groups(matrix: jax.Array) -> int:
    """Of B or C; 0 if it is constant over time."""
    return {2: 0, 3: 1}.get(matrix.ndim, matrix.shape[-2])


def _widened(array: jax.Array | None) -> jax.Array | None:
    return None if array is None else array.astype(jnp.float32)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
