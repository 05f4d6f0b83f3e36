"""The selective scan as Mosaic GPU kernels, for Hopper and newer: the arguments brought into the kernels' shape.

The kernels keep the state in registers and shared memory. The forward kernel writes the state at the start of every
chunk of 16 tokens when a gradient will be needed, the backward kernel recomputes the others from there.
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.common.derivatives import differentiable, no_forward_mode, not_differentiable
from pallas_kernels.common.devices import cuda_compute_capability, target_platform
from pallas_kernels.common.warpgroup import launch
from pallas_kernels.selective_scan.argument_layout import (
    Features,
    decay_rates,
    decline_unusual,
    group_count,
    pad_channels,
    per_group,
    round_up,
    segment_starts,
    unpad_channels,
)
from pallas_kernels.selective_scan.arguments import OP, Discretization, ScanOutput
from pallas_kernels.selective_scan.pallas_gpu import backward as pallas_gpu_backward
from pallas_kernels.selective_scan.pallas_gpu import edge as pallas_gpu_parts
from pallas_kernels.selective_scan.pallas_gpu import forward as pallas_gpu_forward
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, SLICE, Geometry, Tiling
from pallas_kernels.selective_scan.pallas_gpu.tilings import choose_tilings

Arrays = dict[str, jax.Array]
MAX_STATES = 256
_SEQUENCES = ("x", "dt", "z")
# Of the kernel for parts, forward and in reverse.
_PART_INPUTS = (("x", "dt", "B", "A", "dt_bias", "starts"), ("dy", "z", "dt", "C", "A", "dt_bias", "starts"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static about a scan.

    Attributes:
        dt_softplus: apply softplus to dt.
        interpreted: run the kernels in Pallas' interpreter.
        forward, backward: how the work of the two directions is spread.
    """

    dt_softplus: bool
    interpreted: bool
    forward: Tiling
    backward: Tiling


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
    tilings: tuple[Tiling, Tiling] | None = None,
) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`; on a CPU the kernels are interpreted, which is slow.

    `tilings`, for the forward and the backward pass, replaces the choice of `choose_tilings`.

    Raises:
        NotImplementedError: the target is no GPU of compute capability 9.0 or more, A is complex, B or C is constant
            over time, N is over 256, the discretization is not "euler", or a dtype is neither float32 nor bfloat16.
    """
    arrays = {"x": x, "dt": dt, "z": z, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "state": initial_state}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    options = _choose(arrays, dt_softplus=dt_softplus, discretization=discretization, tilings=tilings)
    y, final_state = _scan(options, arrays, segment_ids)
    return ScanOutput(y=y, final_state=final_state)


def edge_state(
    arrays: Arrays,
    segment_ids: jax.Array | None,
    *,
    dt_softplus: bool,
    discretization: Discretization,
    backwards: bool,
) -> jax.Array:
    """See `pallas_kernels.selective_scan.edge_states`; backwards "x" is dy.

    Raises:
        NotImplementedError: as `selective_scan`.
    """
    options = _choose(arrays, dt_softplus=dt_softplus, discretization=discretization)

    def run(arrays: Arrays, segment_ids: jax.Array | None) -> jax.Array:
        return _edge_state(options, arrays, segment_ids, backwards=backwards)

    return not_differentiable("selective_scan_edge", "pallas_gpu", run)(arrays, segment_ids)


def _edge_state(options: _Options, arrays: Arrays, segment_ids: jax.Array | None, *, backwards: bool) -> jax.Array:
    geometry, padded = _prepare(options, options.backward if backwards else options.forward, arrays, segment_ids)
    if backwards:
        padded["dy"] = padded.pop("x")
    parts = geometry.tiling.parts
    results = _run_parts(options, geometry, padded, parts)
    states = results["part_states"].reshape(parts, geometry.batch, geometry.width, geometry.states)
    steps = results["part_steps"].reshape(parts, geometry.batch, geometry.width, 1)
    order = list(reversed(range(parts))) if backwards else list(range(parts))
    state = states[order[0]]
    for part in order[1:]:
        state = jnp.exp(steps[part] * padded["A"][None]) * state + states[part]
    return _unpadded_state(geometry, state, arrays)


def _choose(
    arrays: Arrays, *, dt_softplus: bool, discretization: Discretization, tilings: tuple[Tiling, Tiling] | None = None
) -> _Options:
    """What is static about a scan of these arrays.

    Raises:
        NotImplementedError: see `selective_scan`.
    """
    if target_platform() != "cpu" and (cuda_compute_capability() or 0) < 90:
        raise NotImplementedError(f"{OP}: 'pallas_gpu' needs an NVIDIA GPU of compute capability 9.0 or more")
    decline_unusual("pallas_gpu", arrays, discretization=discretization, max_states=MAX_STATES)
    batch, length, channels = arrays["x"].shape
    forward, backward = tilings or choose_tilings(batch, length, channels, arrays["A"].shape[1])
    is_interpreted = target_platform() == "cpu"
    return _Options(dt_softplus=dt_softplus, interpreted=is_interpreted, forward=forward, backward=backward)


def _scan_outputs(options: _Options, arrays: Arrays, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    outputs, *_ = _run_forward(options, arrays, segment_ids, checkpoints=False)
    return outputs


def _scan_forward(options: _Options, arrays: Arrays, segment_ids: jax.Array | None):
    outputs, checkpoints = _run_forward(options, arrays, segment_ids, checkpoints=True)
    return outputs, (arrays, segment_ids, checkpoints)


def _run_forward(options: _Options, arrays: Arrays, segment_ids: jax.Array | None, *, checkpoints: bool):
    """(y, final state), and the states at the starts of chunks, of the kernels' shape."""
    geometry, padded = _prepare(options, options.forward, arrays, segment_ids)
    if geometry.tiling.parts > 1:
        padded |= _run_parts(options, geometry, padded, geometry.tiling.parts - 1)
    outputs = {
        "y": jax.ShapeDtypeStruct(padded["x"].shape, arrays["x"].dtype),
        "final_state": jax.ShapeDtypeStruct((geometry.batch * geometry.width, geometry.states), jnp.float32),
    }
    if checkpoints:
        shape = (geometry.batch * geometry.chunks * geometry.width, geometry.states)
        outputs["checkpoints"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    parts = geometry.tiling.parts
    results = _call(options, pallas_gpu_forward, geometry, parts, padded, outputs, checkpoints=checkpoints)
    y = _unpadded_sequence(geometry, results["y"], arrays["x"].shape)
    final_state = _unpadded_state(geometry, results["final_state"], arrays)
    return (y, final_state), results.get("checkpoints")


def _scan_backward(options: _Options, residuals, cotangents):
    arrays, segment_ids, checkpoints = residuals
    dy, dfinal_state = cotangents
    geometry, padded = _prepare(options, options.backward, arrays, segment_ids)
    padded.pop("initial_state", None)
    padded["dy"] = _padded_sequence(geometry, dy)
    parts = geometry.tiling.parts
    if parts > 1:
        padded |= _run_parts(options, geometry, padded, parts - 1)
    padded["checkpoints"] = checkpoints
    padded["dfinal_state"] = _padded_state(geometry, dfinal_state)

    def float32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    rows = geometry.batch * geometry.width
    tokens = geometry.batch * geometry.length
    outputs = {
        f"d{name}": jax.ShapeDtypeStruct(padded[name].shape, arrays[name].dtype)
        for name in _SEQUENCES
        if name in arrays
    }
    outputs["dmatrices"] = float32(geometry.blocks * tokens, geometry.groups * 2 * geometry.states)
    outputs["dinitial_state"] = float32(rows, geometry.states)
    outputs["dA"] = float32(parts * rows, geometry.states)
    for name in ("D", "dt_bias"):
        if name in arrays:
            outputs[f"d{name}"] = float32(parts * geometry.batch, geometry.width)
    results = _call(options, pallas_gpu_backward, geometry, parts, padded, outputs)
    return _gradients(geometry, arrays, results)


_scan = differentiable(
    _scan_outputs, forward=_scan_forward, backward=_scan_backward, tangent=no_forward_mode(OP, "pallas_gpu")
)


def _run_parts(options: _Options, geometry: Geometry, padded: Arrays, parts: int) -> Arrays:
    """What the first parts of the sequence make of the state by themselves; with a "dy" the last, in reverse."""
    names = _PART_INPUTS["dy" in padded]
    rows = geometry.tiling.parts * geometry.batch * geometry.width
    outputs = {
        "part_states": jax.ShapeDtypeStruct((rows, geometry.states), jnp.float32),
        "part_steps": jax.ShapeDtypeStruct((rows, 1), jnp.float32),
    }
    inputs = {name: padded[name] for name in names if name in padded}
    return _call(options, pallas_gpu_parts, geometry, parts, inputs, outputs)


def _call(
    options: _Options,
    module: ModuleType,
    geometry: Geometry,
    parts: int,
    inputs: Arrays,
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    checkpoints: bool = False,
) -> Arrays:
    """Runs the kernel of a module over some parts of the sequence."""
    features = Features(softplus=options.dt_softplus, checkpoints=checkpoints)
    return launch(
        functools.partial(module.kernel, geometry, features),
        inputs=inputs,
        outputs=outputs,
        scratch=module.scratch_types(geometry),
        grid=geometry.grid(parts),
        name=f"pallas_gpu_{module.__name__.rsplit('.', 1)[-1]}",
        interpreted=options.interpreted,
    )


def _prepare(
    options: _Options, tiling: Tiling, arrays: Arrays, segment_ids: jax.Array | None
) -> tuple[Geometry, Arrays]:
    """Sizes, and the kernels' inputs: padded to whole blocks and with all leading axes in one."""
    batch, length, channels = arrays["x"].shape
    groups = group_count(arrays["B"], arrays["C"])
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
    padded = {name: _padded_sequence(geometry, arrays[name]) for name in _SEQUENCES if name in arrays}
    padded |= {name: _padded_matrix(geometry, arrays[name]) for name in ("B", "C")}
    padded["A"] = _padded_state(geometry, decay_rates(arrays["A"])[None])
    for name in ("D", "dt_bias"):
        if name in arrays:
            padded[name] = _padded_channels(geometry, arrays[name][None].astype(jnp.float32))
    if "state" in arrays:
        padded["initial_state"] = _padded_state(geometry, arrays["state"].astype(jnp.float32))
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, geometry.length - length)))
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


def _unpadded_state(geometry: Geometry, array: jax.Array, arrays: Arrays) -> jax.Array:
    """(R G F, N) to (R, E, N)."""
    channels, states = arrays["A"].shape
    array = array.reshape(-1, geometry.groups, geometry.channels, geometry.states)
    array = array[:, :, : channels // geometry.groups, :states]
    return array.reshape(array.shape[0], channels, states)


def _gradients(geometry: Geometry, arrays: Arrays, results: Arrays) -> Arrays:
    """The kernel's results as gradients of the arguments; what blocks have computed apart is summed here."""
    gradients = {
        name: _unpadded_sequence(geometry, results[f"d{name}"], arrays["x"].shape)
        for name in _SEQUENCES
        if name in arrays
    }
    dA = results["dA"].reshape(-1, geometry.width, geometry.states).sum(axis=0)
    gradients["A"] = _unpadded_state(geometry, dA, arrays)[0]
    if "state" in arrays:
        gradients["state"] = _unpadded_state(geometry, results["dinitial_state"], arrays)
    for name in ("D", "dt_bias"):
        if name in arrays:
            total = results[f"d{name}"].sum(axis=0)
            gradients[name] = _unpadded_channels(geometry, total, arrays["x"].shape[2])
    shape = (geometry.blocks, geometry.batch, geometry.length, geometry.groups, 2, geometry.states)
    dmatrices = results["dmatrices"].reshape(shape).sum(axis=0)
    for kind, name in enumerate(("B", "C")):
        matrix = arrays[name]
        gradient = dmatrices[:, : matrix.shape[1], :, kind, : matrix.shape[-1]]
        if matrix.ndim == 3 or matrix.shape[2] != geometry.groups:
            gradient = gradient.sum(axis=2, keepdims=True)
        gradients[name] = gradient.reshape(matrix.shape)
    return {name: gradient.astype(arrays[name].dtype) for name, gradient in gradients.items()}
