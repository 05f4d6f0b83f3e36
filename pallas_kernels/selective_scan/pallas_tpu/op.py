"""The selective scan as Pallas kernels for TPUs: the arguments brought into the kernels' shape.

The kernels keep the state on the chip. The forward kernel writes the state before every group of 16 tokens when a
gradient will be needed, the backward kernel computes the others again from there.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.arguments import Arguments
from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.channels import gradient_of_matrix, group_count, pad_channels, per_group, unpad_channels
from pallas_kernels.common.checks import decline_off_tpu
from pallas_kernels.common.derivatives import differentiable_op, no_forward_mode, not_differentiable
from pallas_kernels.common.devices import target_device_kind, target_platform
from pallas_kernels.common.partitioning import result_type
from pallas_kernels.common.register_math import LOG2_E
from pallas_kernels.common.segments import segment_starts
from pallas_kernels.selective_scan.arguments import (
    AnyScanArguments,
    EdgeState,
    FinalStateArguments,
    InitialCotangentArguments,
    ScanArguments,
    ScanOutput,
)
from pallas_kernels.selective_scan.kernel_inputs import Features, decay_rates, decline_unusual
from pallas_kernels.selective_scan.pallas_tpu import backward, edge, forward
from pallas_kernels.selective_scan.pallas_tpu.geometry import Geometry
from pallas_kernels.selective_scan.pallas_tpu.tilings import Generation, choose_geometry, generation

# Makes softplus of a token that does not exist zero.
_NEVER = -1e30
INTERPRETER = pltpu.InterpretParams()

_SEQUENCES = ("x", "dt", "z")
_KINDS = {
    "x": "sequence",
    "dt": "sequence",
    "z": "sequence",
    "y": "sequence",
    "dy": "sequence",
    "matrices": "matrices",
    "dmatrices": "dmatrices",
    "A": "rates",
    "D": "channels",
    "dt_bias": "channels",
    "initial_state": "state",
    "final_state": "state",
    "dfinal_state": "state",
    "dinitial_state": "state",
    "dA": "state",
    "dD": "rows",
    "ddt_bias": "rows",
    "dx": "sequence",
    "ddt": "sequence",
    "dz": "sequence",
    "checkpoints": "checkpoints",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """How a call runs."""

    geometry: Geometry
    vmem_bytes: int
    interpreted: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launch:
    """A kernel of this backend.

    Attributes:
        name: in profiles.
        body: what a program does, of (geometry, features, memory by name).
        scratch: shapes of its memory on the chip.
        is_reversed: chunks of the sequence come from the last to the first.
    """

    name: str
    body: Callable[[Geometry, Features, dict[str, jax.Array]], None]
    scratch: Callable[[Geometry], Mapping[str, tuple[int, ...]]]
    is_reversed: bool


_FORWARD = _Launch(name="forward", body=forward.kernel, scratch=forward.scratch_shapes, is_reversed=False)
_BACKWARD = _Launch(name="backward", body=backward.kernel, scratch=backward.scratch_shapes, is_reversed=True)
_FINAL_STATE = _Launch(name="edge", body=edge.final_state, scratch=edge.scratch_shapes, is_reversed=False)
_INITIAL_COTANGENT = _Launch(name="edge", body=edge.initial_cotangent, scratch=edge.scratch_shapes, is_reversed=True)


def selective_scan(arguments: ScanArguments, *, chip: Generation | None = None) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`; on a CPU the kernels are interpreted, which is slow.

    `chip` replaces what the table says of the device.

    Raises:
        NotImplementedError: the target is not a TPU or several without `jax.shard_map`, a size is a symbol, A is
            complex, B or C is constant over time, N is over 256, the discretization is not "euler", or a dtype is
            neither float32 nor bfloat16.
    """
    return _scan(_choose(arguments, chip), arguments)


def final_state(arguments: FinalStateArguments) -> EdgeState:
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_final_state`.

    Raises:
        NotImplementedError: as `selective_scan`.
    """
    return _edge_state(_FINAL_STATE, "final_state", arguments)


def initial_cotangent(arguments: InitialCotangentArguments) -> EdgeState:
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_initial_cotangent`.

    Raises:
        NotImplementedError: as `selective_scan`.
    """
    return _edge_state(_INITIAL_COTANGENT, "dinitial_state", arguments)


def _edge_state(kernel: _Launch, output: str, arguments: AnyScanArguments) -> EdgeState:
    """Runs one of the two edge kernels, whose state (B, E, N) has the name `output` there.

    Whoever differentiates the state gets NotImplementedError.
    """
    options = _choose(arguments)

    def run(arguments: AnyScanArguments) -> jax.Array:
        inputs = _prepare(options, arguments)
        results = _call(options, kernel, _features(arguments), inputs, {output: jnp.dtype(jnp.float32)})
        return _state_of_blocks(options.geometry, results[output], arguments)

    return EdgeState(state=not_differentiable(arguments.op, "pallas_tpu", run)(arguments))


def _features(arguments: AnyScanArguments, *, checkpoints: bool = False) -> Features:
    return Features(softplus=arguments.dt_softplus, checkpoints=checkpoints)


def _choose(arguments: Arguments, chip: Generation | None = None) -> _Options:
    """How a call of these arguments runs.

    Raises:
        NotImplementedError: see `selective_scan`.
    """
    decline_off_tpu(arguments.op)
    decline_unusual("pallas_tpu", arguments)
    arrays = arguments.arrays()
    batch, length, channels = arrays["dt"].shape
    groups = group_count(*(arrays[name] for name in ("B", "C") if name in arrays))
    chip = chip or generation(target_device_kind())
    states = arrays["A"].shape[1]
    sizes = {"batch": batch, "length": length, "groups": groups, "channels": channels // groups, "states": states}
    return _Options(
        geometry=choose_geometry(chip, **sizes),
        vmem_bytes=chip.vmem_bytes,
        interpreted=target_platform() == "cpu",
    )


def _scan_outputs(options: _Options, arguments: ScanArguments) -> ScanOutput:
    """The result without the states that only a backward pass would read."""
    return _run_forward(options, arguments, checkpoints=False)[0]


def _scan_forward(options: _Options, arguments: ScanArguments) -> tuple[ScanOutput, jax.Array | None]:
    """The result, and the state before every span of 16 tokens for the backward kernel.

    The states are float32, (B, spans, blocks of all strips, N, channels of a block).
    """
    return _run_forward(options, arguments, checkpoints=True)


def _run_forward(
    options: _Options, arguments: ScanArguments, *, checkpoints: bool
) -> tuple[ScanOutput, jax.Array | None]:
    """The result, and the states before groups of tokens, of the kernels' shape."""
    geometry = options.geometry
    inputs = _prepare(options, arguments)
    if arguments.initial_state is not None:
        inputs["initial_state"] = _state_in_blocks(geometry, arguments.initial_state.astype(jnp.float32))
    dtypes = {"y": arguments.x.dtype, "final_state": jnp.float32}
    if checkpoints:
        dtypes["checkpoints"] = jnp.float32
    results = _call(options, _FORWARD, _features(arguments, checkpoints=checkpoints), inputs, dtypes)
    y = _unpadded_sequence(geometry, results["y"], arguments)
    final_state = _state_of_blocks(geometry, results["final_state"], arguments)
    return ScanOutput(y=y, final_state=final_state), results.get("checkpoints")


def _scan_backward(
    options: _Options, arguments: ScanArguments, checkpoints: jax.Array, cotangents: ScanOutput
) -> Arrays:
    """Gradients by argument: one kernel goes through the chunks from the last to the first.

    It starts from the final state's cotangent, and computes the states of each span again from the one stored before
    it. The kernel writes the gradients of x, dt and z in their dtypes and the others in float32.
    """
    geometry, given = options.geometry, arguments.arrays()
    inputs = _prepare(options, arguments)
    inputs |= {
        "dy": _padded_sequence(geometry, cotangents.y),
        "checkpoints": checkpoints,
        "dfinal_state": _state_in_blocks(geometry, cotangents.final_state),
    }
    dtypes = {f"d{name}": given[name].dtype for name in _SEQUENCES if name in given}
    wide = ("dmatrices", "dinitial_state", "dA", *(f"d{name}" for name in ("D", "dt_bias") if name in given))
    dtypes |= dict.fromkeys(wide, jnp.dtype(jnp.float32))
    return _gradients(geometry, arguments, _call(options, _BACKWARD, _features(arguments), inputs, dtypes))


_scan = differentiable_op(
    _scan_outputs,
    forward=_scan_forward,
    backward=_scan_backward,
    tangent=no_forward_mode("selective_scan", "pallas_tpu"),
)


def _call(
    options: _Options, kernel: _Launch, features: Features, inputs: Arrays, dtypes: Mapping[str, jnp.dtype]
) -> Arrays:
    """Runs a kernel; `dtypes` names the outputs."""
    geometry = options.geometry
    scratch = kernel.scratch(geometry)
    names = [*inputs, *dtypes, *scratch]

    def body(*refs):
        kernel.body(geometry, features, dict(zip(names, refs, strict=True)))

    def specs(names):
        return [geometry.spec(_KINDS[name], is_reversed=kernel.is_reversed) for name in names]

    results = pl.pallas_call(
        body,
        grid=geometry.grid,
        in_specs=specs(inputs),
        out_specs=specs(dtypes),
        out_shape=[result_type(inputs["dt"], geometry.shape(_KINDS[name]), dtype) for name, dtype in dtypes.items()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=options.vmem_bytes,
        ),
        interpret=INTERPRETER if options.interpreted else False,
        name=f"selective_scan_pallas_tpu_{kernel.name}",
    )(*inputs.values())
    return dict(zip(dtypes, results, strict=True))


def _prepare(options: _Options, arguments: AnyScanArguments) -> Arrays:
    """The inputs of all kernels, padded to whole blocks; tokens that do not exist leave the state as it is."""
    geometry, arrays = options.geometry, arguments.arrays()
    inputs = {name: _padded_sequence(geometry, arrays[name]) for name in ("x", "dy", "z") if name in arrays}
    tail = _NEVER if arguments.dt_softplus else 0.0
    inputs["dt"] = _padded_sequence(geometry, arrays["dt"], tail=tail)
    matrices = [arrays[name] for name in ("B", "C") if name in arrays]
    inputs["matrices"] = _matrices(geometry, matrices[0], matrices[-1], arrays.get("segment_ids"))
    inputs["A"] = _state_in_blocks(geometry, decay_rates(arrays["A"])[None] * LOG2_E)[0]
    for name in ("D", "dt_bias"):
        if name in arrays:
            padded = pad_channels(arrays[name].astype(jnp.float32), groups=geometry.groups, channels=geometry.channels)
            inputs[name] = padded.reshape(geometry.shape("channels"))
    return inputs


def _padded_sequence(geometry: Geometry, array: jax.Array, *, tail: float = 0.0) -> jax.Array:
    """(B, L, E) to (B, L, G F), with `tail` for tokens that do not exist."""
    array = pad_channels(array, groups=geometry.groups, channels=geometry.channels)
    padding = geometry.length - array.shape[1]
    return jnp.pad(array, ((0, 0), (0, padding), (0, 0)), constant_values=tail)


def _unpadded_sequence(geometry: Geometry, array: jax.Array, arguments: ScanArguments) -> jax.Array:
    """The inverse of `_padded_sequence`, for the sizes of x."""
    _, length, channels = arguments.x.shape
    return unpad_channels(array[:, :length], groups=geometry.groups, channels=channels)


def _matrices(geometry: Geometry, B: jax.Array, C: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """(B, G, L, 2 N + 1): B and C of every token, and 1 where a segment starts.

    Together, because rows of less than 128 numbers take the memory of 128.
    """
    B, C = (
        jnp.pad(matrix, ((0, 0), (0, 0), (0, 0), (0, geometry.states - matrix.shape[3])))
        for matrix in (per_group(B, geometry.groups), per_group(C, geometry.groups))
    )
    starts = jnp.zeros(B.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    starts = jnp.broadcast_to(starts[:, :, None, None], (*B.shape[:3], 1))
    dtype = jnp.result_type(B, C)
    matrices = jnp.concatenate([B.astype(dtype), C.astype(dtype), starts.astype(dtype)], axis=-1)
    matrices = jnp.pad(matrices, ((0, 0), (0, geometry.length - B.shape[1]), (0, 0), (0, 0)))
    return jnp.swapaxes(matrices, 1, 2)


def _state_in_blocks(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(R, E, N) to (R, blocks of all strips, N, channels of a block)."""
    array = jnp.swapaxes(array, 1, 2)
    array = pad_channels(array, groups=geometry.groups, channels=geometry.channels)
    array = jnp.pad(array, ((0, 0), (0, geometry.states - array.shape[1]), (0, 0)))
    array = array.reshape(*array.shape[:2], -1, geometry.tiling.channels)
    return jnp.swapaxes(array, 1, 2)


def _state_of_blocks(geometry: Geometry, array: jax.Array, arguments: Arguments) -> jax.Array:
    """The inverse of `_state_in_blocks`, for the sizes of A."""
    channels, states = arguments.arrays()["A"].shape
    array = jnp.swapaxes(array, 1, 2).reshape(array.shape[0], geometry.states, geometry.width)
    array = unpad_channels(array, groups=geometry.groups, channels=channels)
    return jnp.swapaxes(array[:, :states], 1, 2)


def _gradients(geometry: Geometry, arguments: ScanArguments, results: Arrays) -> Arrays:
    """The kernel's results as gradients of the arguments; sums over the batch and over strips are made here."""
    given = arguments.arrays()
    gradients = {
        name: _unpadded_sequence(geometry, results[f"d{name}"], arguments) for name in _SEQUENCES if name in given
    }
    gradients["A"] = _state_of_blocks(geometry, results["dA"].sum(axis=0, keepdims=True), arguments)[0]
    gradients["initial_state"] = _state_of_blocks(geometry, results["dinitial_state"], arguments)
    for name in ("D", "dt_bias"):
        if name in given:
            total = results[f"d{name}"].sum(axis=(0, 2)).reshape(-1)
            gradients[name] = unpad_channels(total, groups=geometry.groups, channels=arguments.x.shape[2])
    batch, length = arguments.x.shape[:2]
    shape = batch, geometry.groups, geometry.strips_per_group, geometry.length, 2, geometry.states
    dmatrices = results["dmatrices"].reshape(shape).sum(axis=2)
    for index, name in enumerate(("B", "C")):
        matrix = given[name]
        gradient = jnp.swapaxes(dmatrices[:, :, :length, index, : matrix.shape[-1]], 1, 2)
        gradients[name] = gradient_of_matrix(gradient, matrix)
    return gradients
