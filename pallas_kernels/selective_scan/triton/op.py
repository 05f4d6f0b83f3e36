"""The selective scan as Triton kernels: for GPUs before Hopper, and for arguments that the Mosaic GPU kernels decline.

The forward kernel keeps the state in registers and, when a gradient will be needed, stores it at the start of every
chunk of 32 or 64 tokens; the backward kernel recomputes the others from there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common import triton_call
from pallas_kernels.common.checks import decline_double_precision, decline_symbolic_sizes
from pallas_kernels.common.derivatives import differentiable, no_forward_mode
from pallas_kernels.selective_scan.argument_layout import group_count
from pallas_kernels.selective_scan.arguments import OP, Discretization, ScanOutput

Arrays = dict[str, jax.Array]
MAX_STATES = 256
_KERNELS = "pallas_kernels.selective_scan.triton.kernels"
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
        lanes: that share a channel.
        states: of a channel that a lane holds.
        chunk: tokens from one stored state to the next.
        forward, backward: tiles of the kernels.
    """

    lanes: int
    states: int
    chunk: int
    forward: Tile
    backward: Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static about a scan."""

    dt_softplus: bool
    discretization: Discretization
    tiling: Tiling


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    dt_softplus: bool,
    discretization: Discretization,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    tiling: Tiling | None = None,
) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`; `tiling` replaces the default one.

    Raises:
        NotImplementedError: the target is no CUDA GPU of compute capability 8.0 or more, jax-triton is not installed, A
            is complex, N is over 256, an argument is float64, or a size is not known.
    """
    decline_double_precision(OP, x, dt, A, B, C, D, z, dt_bias, initial_state)
    if jnp.issubdtype(A.dtype, jnp.complexfloating):
        raise NotImplementedError(f"{OP}: 'triton' takes a real A only, got {A.dtype}")
    if A.shape[1] > MAX_STATES:
        raise NotImplementedError(f"{OP}: 'triton' takes at most {MAX_STATES} states, got {A.shape[1]}")
    decline_symbolic_sizes(OP, "triton", x, A)
    triton_call.import_kernels(OP, _KERNELS)
    options = _Options(
        dt_softplus=dt_softplus,
        discretization=discretization,
        tiling=tiling or default_tiling(A.shape[1], batch_channels=x.shape[0] * x.shape[2]),
    )
    arrays = {"x": x, "dt": dt, "z": z, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    arrays["initial_state"] = initial_state
    arrays = {name: array for name, array in arrays.items() if array is not None}
    y, final_state = _scan(options, arrays, segment_ids)
    return ScanOutput(y=y, final_state=final_state)


def default_tiling(states: int, *, batch_channels: int) -> Tiling:
    """The tiling for N states.

    The backward pass keeps several copies of a tile in the registers of a thread, of which there are 255. More channels
    in its programs mean fewer partial sums of the gradients of B and C, which take 8 N / channels bytes a token and
    channel; fewer mean more programs to fill the chip with.
    """
    states = _power_of_two(states)
    lanes = min(max(states // 4, 1), 16)
    channels = max(_LANES // lanes, 8)
    tokens = max(min(32 * lanes // states, 8), 1)
    backward = _BACKWARD_TILES[states]
    if states == 16 and batch_channels >= 2**15:
        backward = Tile(tokens=4, channels=64, warps=4)
    return Tiling(
        lanes=lanes,
        states=states // lanes,
        chunk=64 if backward.tokens >= 4 else 32,
        forward=Tile(tokens=tokens, channels=channels, warps=channels * lanes // _LANES),
        backward=backward,
    )


def _power_of_two(size: int) -> int:
    """The smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _scan_outputs(options: _Options, arrays: Arrays, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    results = _run_forward(options, arrays, segment_ids, has_checkpoints=False)
    return results["y"], results["final_state"]


def _scan_forward(options: _Options, arrays: Arrays, segment_ids: jax.Array | None):
    results = _run_forward(options, arrays, segment_ids, has_checkpoints=True)
    return (results["y"], results["final_state"]), (arrays, segment_ids, results["checkpoints"])


def _run_forward(
    options: _Options, arrays: Arrays, segment_ids: jax.Array | None, *, has_checkpoints: bool
) -> dict[str, jax.Array]:
    batch, length, channels = arrays["x"].shape
    state_shape = (channels, arrays["A"].shape[1])
    chunks = -(-length // options.tiling.chunk)
    constants = _constants(options, arrays, segment_ids, options.tiling.forward)
    constants |= {"HAS_INITIAL": "initial_state" in arrays, "HAS_CHECKPOINTS": has_checkpoints}
    outputs = {
        "y": jax.ShapeDtypeStruct(arrays["x"].shape, arrays["x"].dtype),
        "final_state": _float32(batch, *state_shape),
        "checkpoints": _float32(batch, chunks, *state_shape) if has_checkpoints else None,
    }
    inputs = _inputs(arrays)
    inputs["initial_state"] = _widened(arrays.get("initial_state"))
    inputs["segment_ids"] = segment_ids
    return _call(options, arrays, "forward", inputs, outputs, constants, options.tiling.forward)


def _scan_backward(options: _Options, residuals, cotangents):
    arrays, segment_ids, checkpoints = residuals
    dy, dfinal_state = cotangents
    batch, length, channels = arrays["x"].shape
    states = arrays["A"].shape[1]
    tile = options.tiling.backward
    groups, blocks = group_count(arrays["B"], arrays["C"]), _blocks(arrays, tile)
    constants = _constants(options, arrays, segment_ids, tile)
    inputs = _inputs(arrays)
    inputs |= {"segment_ids": segment_ids, "checkpoints": checkpoints, "dy": dy, "dfinal_state": dfinal_state}

    def like(name):
        return jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) if name in arrays else None

    def of_matrix(name):
        if arrays[name].ndim == 2:
            return _float32(batch, channels, states)
        return _float32(blocks // groups, batch, length, groups, states)

    kept = options.tiling.chunk // tile.tokens
    kept_states = options.tiling.lanes * options.tiling.states
    outputs = {f"d{name}": like(name) for name in ("x", "dt", "z")}
    outputs |= {"dA": _float32(batch, channels, states), "dB": of_matrix("B"), "dC": of_matrix("C")}
    outputs |= {f"d{name}": _float32(batch, channels) if name in arrays else None for name in ("D", "dt_bias")}
    outputs["dinitial_state"] = _float32(batch, channels, states)
    outputs["scratch"] = _float32(batch * blocks, kept, tile.channels, kept_states)
    results = _call(options, arrays, "backward", inputs, outputs, constants, tile)
    return {name: _summed(results[f"d{name}"], name, arrays[name]) for name in arrays}


_scan = differentiable(
    _scan_outputs, forward=_scan_forward, backward=_scan_backward, tangent=no_forward_mode(OP, "triton")
)


def _summed(gradient: jax.Array, name: str, argument: jax.Array) -> jax.Array:
    """A gradient from what the kernel has computed of it, row by row or block by block."""
    if name in ("B", "C") and argument.ndim > 2:
        gradient = gradient.sum(axis=0)
        if argument.ndim == 3 or argument.shape[2] == 1:
            gradient = gradient.sum(axis=2, keepdims=True)
        gradient = gradient.reshape(argument.shape)
    elif name in ("A", "B", "C", "D", "dt_bias"):
        gradient = gradient.sum(axis=0)
    return gradient.astype(argument.dtype)


def _call(
    options: _Options,
    arrays: Arrays,
    kernel: str,
    inputs: dict[str, jax.Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct | None],
    constants: dict[str, int | bool],
    tile: Tile,
) -> dict[str, jax.Array]:
    kernels = triton_call.import_kernels(OP, _KERNELS)
    constants = constants | {
        "T": tile.tokens,
        "R": options.tiling.states,
        "E": tile.channels,
        "P": options.tiling.lanes,
        "CHUNK": options.tiling.chunk // tile.tokens,
    }
    return triton_call.call(
        getattr(kernels, kernel),
        inputs,
        outputs,
        constants,
        programs=arrays["x"].shape[0] * _blocks(arrays, tile),
        warps=tile.warps,
        name=f"{OP}_{kernel}",
    )


def _inputs(arrays: Arrays) -> dict[str, jax.Array | None]:
    """The arguments that both kernels take first. Matrices are in float32, which spares the kernels a conversion."""
    inputs = {name: arrays.get(name) for name in ("x", "dt", "z")}
    return inputs | {name: _widened(arrays.get(name)) for name in ("A", "B", "C", "D", "dt_bias")}


def _constants(options: _Options, arrays: Arrays, segment_ids: jax.Array | None, tile: Tile) -> dict[str, int | bool]:
    """The compile-time parameters that both kernels take first."""
    batch, length, channels = arrays["x"].shape
    groups = {2: lambda shape: 0, 3: lambda shape: 1, 4: lambda shape: shape[2]}
    return {
        "BATCH": batch,
        "LENGTH": length,
        "CHANNELS": channels,
        "STATES": arrays["A"].shape[1],
        "GROUPS": group_count(arrays["B"], arrays["C"]),
        "B_GROUPS": groups[arrays["B"].ndim](arrays["B"].shape),
        "C_GROUPS": groups[arrays["C"].ndim](arrays["C"].shape),
        "SOFTPLUS": options.dt_softplus,
        "ZOH": options.discretization == "zoh",
        "HAS_D": "D" in arrays,
        "HAS_Z": "z" in arrays,
        "HAS_BIAS": "dt_bias" in arrays,
        "HAS_SEGMENTS": segment_ids is not None,
    }


def _blocks(arrays: Arrays, tile: Tile) -> int:
    """Programs of a batch row; no block of channels crosses a group."""
    groups = group_count(arrays["B"], arrays["C"])
    return groups * -(-(arrays["x"].shape[2] // groups) // tile.channels)


def _widened(array: jax.Array | None) -> jax.Array | None:
    return None if array is None else array.astype(jnp.float32)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
