"""The selective scan as Mosaic GPU kernels, for Hopper and newer: the arguments brought into the kernels' shape.

The kernels keep the state in registers and shared memory. The forward kernel writes the state at the start of every
chunk of 16 tokens when a gradient will be needed, the backward kernel recomputes the others from there.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.arguments import Arguments
from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.channels import gradient_of_matrix, group_count, pad_channels, per_group, unpad_channels
from pallas_kernels.common.derivatives import differentiable_op, no_forward_mode, not_differentiable
from pallas_kernels.common.devices import cuda_compute_capability, target_platform
from pallas_kernels.common.rounding import round_up
from pallas_kernels.common.segments import segment_starts
from pallas_kernels.common.warpgroup import launch
from pallas_kernels.selective_scan.arguments import (
    AnyScanArguments,
    EdgeState,
    FinalStateArguments,
    InitialCotangentArguments,
    ScanArguments,
    ScanOutput,
)
from pallas_kernels.selective_scan.kernel_inputs import Features, decay_rates, decline_unusual
from pallas_kernels.selective_scan.pallas_gpu import backward, edge, forward
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, SLICE, Geometry, Tiling
from pallas_kernels.selective_scan.pallas_gpu.tilings import choose_tilings

_SEQUENCES = ("x", "dt", "z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """How a call runs.

    Attributes:
        interpreted: run the kernels in Pallas' interpreter.
        forward, backward: how the work of the two directions is spread.
    """

    interpreted: bool
    forward: Tiling
    backward: Tiling


def selective_scan(arguments: ScanArguments, *, tilings: tuple[Tiling, Tiling] | None = None) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`; on a CPU the kernels are interpreted, which is slow.

    `tilings`, for the forward and the backward pass, replaces the choice of `choose_tilings`.

    Raises:
        NotImplementedError: the target is not a GPU of compute capability 9.0 or more, A is complex, B or C is constant
            over time, N is over 256, the discretization is not "euler", or a dtype is neither float32 nor bfloat16.
    """
    return _scan(_choose(arguments, tilings), arguments)


def final_state(arguments: FinalStateArguments) -> EdgeState:
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_final_state`.

    Raises:
        NotImplementedError: as `selective_scan`.
    """
    options = _choose(arguments)
    kernel = not_differentiable(arguments.op, "pallas_gpu", functools.partial(_final_state, options))
    return EdgeState(state=kernel(arguments))


def initial_cotangent(arguments: InitialCotangentArguments) -> EdgeState:
    """See `pallas_kernels.selective_scan.edge_states.selective_scan_initial_cotangent`.

    Raises:
        NotImplementedError: as `selective_scan`.
    """
    options = _choose(arguments)
    kernel = not_differentiable(arguments.op, "pallas_gpu", functools.partial(_initial_cotangent, options))
    return EdgeState(state=kernel(arguments))


def _final_state(options: _Options, arguments: FinalStateArguments) -> jax.Array:
    """The state (B, E, N) after the sequence, from zero before it."""
    geometry, padded = _prepare(options, options.forward, arguments)
    parts = geometry.tiling.parts
    parts_in_time = _by_part(geometry, _run_parts(options, geometry, edge.final_state, arguments, padded, parts))
    return _through_parts(geometry, arguments, padded, parts_in_time)


def _initial_cotangent(options: _Options, arguments: InitialCotangentArguments) -> jax.Array:
    """The cotangent (B, E, N) of the state before the sequence, from zero behind it: the parts are joined backwards."""
    geometry, padded = _prepare(options, options.backward, arguments)
    parts = geometry.tiling.parts
    parts_in_time = _by_part(geometry, _run_parts(options, geometry, edge.initial_cotangent, arguments, padded, parts))
    return _through_parts(geometry, arguments, padded, list(reversed(parts_in_time)))


def _by_part(geometry: Geometry, results: Arrays) -> list[tuple[jax.Array, jax.Array]]:
    """For each part of the sequence, in its order, what the edge kernel wrote: (h', s), float32.

    h' (B, G F, N) is the part's final state from zero or, of the reverse kernel, the cotangent of the state before the
    part's first token from zero behind its last. s (B, G F, 1) is the sum of its step sizes, or about `RESET` of
    geometry.py if a document starts in it, so that exp(s A) is 0.
    """
    parts = geometry.tiling.parts
    states = results["part_states"].reshape(parts, geometry.batch, geometry.width, geometry.states)
    steps = results["part_steps"].reshape(parts, geometry.batch, geometry.width, 1)
    return [(states[part], steps[part]) for part in range(parts)]


def _through_parts(
    geometry: Geometry, arguments: Arguments, padded: Arrays, parts_in_order: list[tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """The state, or its cotangent, (B, E, N) once it has passed through the parts one after the other."""
    state, _ = parts_in_order[0]
    for own, steps in parts_in_order[1:]:
        state = jnp.exp(steps * padded["A"][None]) * state + own
    return _unpadded_state(geometry, state, arguments)


def _choose(arguments: Arguments, tilings: tuple[Tiling, Tiling] | None = None) -> _Options:
    """How a call of these arguments runs.

    Raises:
        NotImplementedError: see `selective_scan`.
    """
    if target_platform() != "cpu" and (cuda_compute_capability() or 0) < 90:
        raise NotImplementedError(f"{arguments.op}: 'pallas_gpu' needs an NVIDIA GPU of compute capability 9.0 or more")
    decline_unusual("pallas_gpu", arguments)
    arrays = arguments.arrays()
    batch, length, channels = arrays["dt"].shape
    forward_tiling, backward_tiling = tilings or choose_tilings(batch, length, channels, arrays["A"].shape[1])
    return _Options(interpreted=target_platform() == "cpu", forward=forward_tiling, backward=backward_tiling)


def _scan_outputs(options: _Options, arguments: ScanArguments) -> ScanOutput:
    """The result where no gradient is needed: the kernel then stores no states at the starts of chunks."""
    return _run_forward(options, arguments, checkpoints=False)[0]


def _scan_forward(options: _Options, arguments: ScanArguments) -> tuple[ScanOutput, jax.Array]:
    """The result, and the state before every chunk of 16 tokens for `_scan_backward`, (B chunks G F, N), float32."""
    return _run_forward(options, arguments, checkpoints=True)


def _run_forward(options: _Options, arguments: ScanArguments, *, checkpoints: bool) -> tuple[ScanOutput, Any]:
    """The result, and the states at the starts of chunks, of the kernels' shape."""
    geometry, padded = _prepare(options, options.forward, arguments)
    parts = geometry.tiling.parts
    if parts > 1:
        padded |= _run_parts(options, geometry, edge.final_state, arguments, padded, parts - 1)
    outputs = {
        "y": jax.ShapeDtypeStruct(padded["x"].shape, arguments.x.dtype),
        "final_state": jax.ShapeDtypeStruct((geometry.batch * geometry.width, geometry.states), jnp.float32),
    }
    if checkpoints:
        shape = (geometry.batch * geometry.chunks * geometry.width, geometry.states)
        outputs["checkpoints"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    features = Features(softplus=arguments.dt_softplus, checkpoints=checkpoints)
    results = _call(options, forward, functools.partial(forward.kernel, geometry, features), geometry, padded, outputs)
    y = _unpadded_sequence(geometry, results["y"], arguments.x.shape)
    final_state = _unpadded_state(geometry, results["final_state"], arguments)
    return ScanOutput(y=y, final_state=final_state), results.get("checkpoints")


def _scan_backward(
    options: _Options, arguments: ScanArguments, checkpoints: jax.Array, cotangents: ScanOutput
) -> Arrays:
    """Gradients of the arguments by name, from the states before chunks and the cotangents of y and the final state.

    If the sequence is cut into parts, the reverse edge kernel first finds what each part but the first hands to
    the one before, so that the backward kernel can work on all parts at once.
    """
    geometry, padded = _prepare(options, options.backward, arguments)
    padded.pop("initial_state", None)
    padded["dy"] = _padded_sequence(geometry, cotangents.y)
    parts = geometry.tiling.parts
    if parts > 1:
        padded |= _run_parts(options, geometry, edge.initial_cotangent, arguments, padded, parts - 1)
    padded["checkpoints"] = checkpoints
    padded["dfinal_state"] = _padded_state(geometry, cotangents.final_state)
    outputs = _gradient_types(geometry, arguments, padded)
    features = Features(softplus=arguments.dt_softplus)
    kernel = functools.partial(backward.kernel, geometry, features)
    return _gradients(geometry, arguments, _call(options, backward, kernel, geometry, padded, outputs))


def _gradient_types(geometry: Geometry, arguments: ScanArguments, padded: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """What the backward kernel writes; what blocks compute apart has a leading axis for them."""
    given, parts = arguments.arrays(), geometry.tiling.parts
    rows, tokens = geometry.batch * geometry.width, geometry.batch * geometry.length

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    types = {
        f"d{name}": jax.ShapeDtypeStruct(padded[name].shape, given[name].dtype) for name in _SEQUENCES if name in given
    }
    types["dmatrices"] = float32(geometry.blocks * tokens, geometry.groups * 2 * geometry.states)
    types["dinitial_state"] = float32(rows, geometry.states)
    types["dA"] = float32(parts * rows, geometry.states)
    for name in ("D", "dt_bias"):
        if name in given:
            types[f"d{name}"] = float32(parts * geometry.batch, geometry.width)
    return types


_scan = differentiable_op(
    _scan_outputs,
    forward=_scan_forward,
    backward=_scan_backward,
    tangent=no_forward_mode("selective_scan", "pallas_gpu"),
)


def _run_parts(
    options: _Options,
    geometry: Geometry,
    kernel: edge.EdgeKernel,
    arguments: AnyScanArguments,
    padded: Arrays,
    parts: int,
) -> Arrays:
    """Final state of each of the first parts, started from zero; in reverse, the initial cotangent of the last ones."""
    rows = geometry.tiling.parts * geometry.batch * geometry.width
    outputs = {
        "part_states": jax.ShapeDtypeStruct((rows, geometry.states), jnp.float32),
        "part_steps": jax.ShapeDtypeStruct((rows, 1), jnp.float32),
    }
    inputs = {name: padded[name] for name in kernel.inputs if name in padded}
    features = Features(softplus=arguments.dt_softplus)
    run = functools.partial(kernel.run, geometry, features)
    return _call(options, edge, run, geometry, inputs, outputs, parts=parts)


def _call(
    options: _Options,
    module: ModuleType,
    kernel: Callable[..., None],
    geometry: Geometry,
    inputs: Arrays,
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    parts: int | None = None,
) -> Arrays:
    """Runs a kernel of a module over some parts of the sequence; None is all."""
    return launch(
        kernel,
        inputs=inputs,
        outputs=outputs,
        scratch=module.scratch_types(geometry),
        grid=geometry.grid(parts or geometry.tiling.parts),
        name=f"pallas_gpu_{module.__name__.rsplit('.', 1)[-1]}",
        interpreted=options.interpreted,
    )


def _prepare(options: _Options, tiling: Tiling, arguments: Arguments) -> tuple[Geometry, Arrays]:
    """Sizes, and the kernels' inputs: padded to whole blocks and with all leading axes in one."""
    arrays = arguments.arrays()
    matrices = {name: arrays[name] for name in ("B", "C") if name in arrays}
    batch, length, channels = arrays["dt"].shape
    groups = group_count(*matrices.values())
    # Both passes see the same padding, so that the one can read what the other has written.
    block = max(options.forward.channels_per_block, options.backward.channels_per_block)
    geometry = Geometry(
        batch=batch,
        groups=groups,
        channels=round_up(channels // groups, block),
        states=round_up(arrays["A"].shape[1], SLICE),
        length=round_up(length, CHUNK),
        valid_length=length,
        tiling=tiling,
    )
    padded = {name: _padded_sequence(geometry, arrays[name]) for name in ("x", "dy", "dt", "z") if name in arrays}
    padded |= {name: _padded_matrix(geometry, matrix) for name, matrix in matrices.items()}
    padded["A"] = _padded_state(geometry, decay_rates(arrays["A"])[None])
    for name in ("D", "dt_bias"):
        if name in arrays:
            padded[name] = _padded_channels(geometry, arrays[name][None].astype(jnp.float32))
    if "initial_state" in arrays:
        padded["initial_state"] = _padded_state(geometry, arrays["initial_state"].astype(jnp.float32))
    if "segment_ids" in arrays:
        starts = jnp.pad(segment_starts(arrays["segment_ids"]), ((0, 0), (0, geometry.length - length)))
        padded["starts"] = starts.astype(jnp.int32).reshape(-1, 1)
    return geometry, padded


def _padded_channels(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(..., E) to (..., G F)."""
    return pad_channels(array, groups=geometry.groups, channels=geometry.channels)


def _unpadded_channels(geometry: Geometry, array: jax.Array, channels: int) -> jax.Array:
    """The inverse of `_padded_channels`."""
    return unpad_channels(array, groups=geometry.groups, channels=channels)


def _padded_sequence(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(B, L, E) to (B L, G F)."""
    array = _padded_channels(geometry, array)
    padding = geometry.length - array.shape[1]
    return jnp.pad(array, ((0, 0), (0, padding), (0, 0))).reshape(-1, geometry.width)


def _unpadded_sequence(geometry: Geometry, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(B L, G F) to the (B, L, E) of `shape`."""
    array = array.reshape(geometry.batch, geometry.length, geometry.width)[:, : shape[1]]
    return _unpadded_channels(geometry, array, shape[2])


def _padded_matrix(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(B, L, N) or (B, L, 1 or G, N) to (B L, G N)."""
    array = per_group(array, geometry.groups)
    padding = (geometry.length - array.shape[1], 0, geometry.states - array.shape[3])
    array = jnp.pad(array, ((0, 0), *((0, size) for size in padding)))
    return array.reshape(-1, geometry.groups * geometry.states)


def _padded_state(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(R, E, N) to (R G F, N)."""
    array = jnp.pad(array, ((0, 0), (0, 0), (0, geometry.states - array.shape[2])))
    if array.shape[1] != geometry.width:
        array = jnp.swapaxes(_padded_channels(geometry, jnp.swapaxes(array, 1, 2)), 1, 2)
    return array.reshape(-1, geometry.states)


def _unpadded_state(geometry: Geometry, array: jax.Array, arguments: Arguments) -> jax.Array:
    """(R G F, N) to (R, E, N)."""
    channels, states = arguments.arrays()["A"].shape
    array = array.reshape(-1, geometry.groups, geometry.channels, geometry.states)
    array = array[:, :, : channels // geometry.groups, :states]
    return array.reshape(array.shape[0], channels, states)


def _gradients(geometry: Geometry, arguments: ScanArguments, results: Arrays) -> Arrays:
    """The kernel's results as gradients of the arguments; what blocks have computed apart is summed here."""
    given = arguments.arrays()
    gradients = {
        name: _unpadded_sequence(geometry, results[f"d{name}"], arguments.x.shape)
        for name in _SEQUENCES
        if name in given
    }
    dA = results["dA"].reshape(-1, geometry.width, geometry.states).sum(axis=0)
    gradients["A"] = _unpadded_state(geometry, dA, arguments)[0]
    gradients["initial_state"] = _unpadded_state(geometry, results["dinitial_state"], arguments)
    for name in ("D", "dt_bias"):
        if name in given:
            total = results[f"d{name}"].sum(axis=0)
            gradients[name] = _unpadded_channels(geometry, total, arguments.x.shape[2])
    shape = (geometry.blocks, geometry.batch, geometry.length, geometry.groups, 2, geometry.states)
    dmatrices = results["dmatrices"].reshape(shape).sum(axis=0)
    for index, name in enumerate(("B", "C")):
        matrix = given[name]
        gradients[name] = gradient_of_matrix(dmatrices[:, : matrix.shape[1], :, index, : matrix.shape[-1]], matrix)
    return gradients
