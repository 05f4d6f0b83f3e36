"""The selective scan as Pallas kernels for TPUs: the arguments brought into the kernels' shape.

The kernels keep the state on the chip. The forward kernel writes the state before every group of 16 tokens when a
gradient will be needed, the backward kernel computes the others again from there.
"""

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.checks import decline_off_tpu
from pallas_kernels.common.derivatives import differentiable, no_forward_mode, not_differentiable
from pallas_kernels.common.devices import target_device_kind, target_platform
from pallas_kernels.common.partitioning import result_type
from pallas_kernels.common.register_math import LOG2_E
from pallas_kernels.selective_scan.argument_layout import (
    Features,
    decay_rates,
    decline_unusual,
    group_count,
    pad_channels,
    per_group,
    segment_starts,
    unpad_channels,
)
from pallas_kernels.selective_scan.arguments import OP, Discretization, ScanOutput
from pallas_kernels.selective_scan.pallas_tpu import backward as pallas_tpu_backward
from pallas_kernels.selective_scan.pallas_tpu import edge as pallas_tpu_edge
from pallas_kernels.selective_scan.pallas_tpu import forward as pallas_tpu_forward
from pallas_kernels.selective_scan.pallas_tpu.geometry import Geometry
from pallas_kernels.selective_scan.pallas_tpu.tilings import Generation, choose_geometry, generation

Arrays = dict[str, jax.Array]
MAX_STATES = 256
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
    """What is static about a scan."""

    dt_softplus: bool
    geometry: Geometry
    vmem_bytes: int
    interpreted: bool


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
    chip: Generation | None = None,
) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`; on a CPU the kernels are interpreted, which is slow.

    `chip` replaces what the table says of the device.

    Raises:
        NotImplementedError: the target is no TPU or several without `jax.shard_map`, a size is a symbol, A is complex,
            B or C is constant over time, N is over 256, the discretization is not "euler", or a dtype is neither
            float32 nor bfloat16.
    """
    arrays = {"x": x, "dt": dt, "z": z, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "state": initial_state}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    options = _choose(arrays, dt_softplus=dt_softplus, discretization=discretization, chip=chip)
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
    output = "dinitial_state" if backwards else "final_state"

    def run(arrays: Arrays, segment_ids: jax.Array | None) -> jax.Array:
        inputs = _prepare(options, arrays, segment_ids)
        if backwards:
            inputs["dy"] = inputs.pop("x")
        dtypes = {output: jnp.dtype(jnp.float32)}
        results = _call(options, pallas_tpu_edge, inputs, dtypes, checkpoints=False, is_reversed=backwards)
        return _state_of_blocks(options.geometry, results[output], arrays)

    return not_differentiable("selective_scan_edge", "pallas_tpu", run)(arrays, segment_ids)


def _choose(
    arrays: Arrays, *, dt_softplus: bool, discretization: Discretization, chip: Generation | None = None
) -> _Options:
    """What is static about a scan of these arrays.

    Raises:
        NotImplementedError: see `selective_scan`.
    """
    decline_off_tpu(OP)
    decline_unusual("pallas_tpu", arrays, discretization=discretization, max_states=MAX_STATES)
    batch, length, channels = arrays["x"].shape
    groups = group_count(arrays["B"], arrays["C"])
    chip = chip or generation(target_device_kind())
    states = arrays["A"].shape[1]
    sizes = {"batch": batch, "length": length, "groups": groups, "channels": channels // groups, "states": states}
    return _Options(
        dt_softplus=dt_softplus,
        geometry=choose_geometry(chip, **sizes),
        vmem_bytes=chip.vmem_bytes,
        interpreted=target_platform() == "cpu",
    )


def _scan_outputs(options: _Options, arrays: Arrays, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    outputs, _ = _run_forward(options, arrays, segment_ids, checkpoints=False)
    return outputs


def _scan_forward(options: _Options, arrays: Arrays, segment_ids: jax.Array | None):
    outputs, checkpoints = _run_forward(options, arrays, segment_ids, checkpoints=True)
    return outputs, (arrays, segment_ids, checkpoints)


def _run_forward(options: _Options, arrays: Arrays, segment_ids: jax.Array | None, *, checkpoints: bool):
    """(y, final state), and the states before groups of tokens, of the kernels' shape."""
    geometry = options.geometry
    inputs = _prepare(options, arrays, segment_ids)
    if "state" in arrays:
        inputs["initial_state"] = _state_in_blocks(geometry, arrays["state"].astype(jnp.float32))
    dtypes = {"y": arrays["x"].dtype, "final_state": jnp.float32}
    if checkpoints:
        dtypes["checkpoints"] = jnp.float32
    results = _call(options, pallas_tpu_forward, inputs, dtypes, checkpoints=checkpoints, is_reversed=False)
    y = _unpadded_sequence(geometry, results["y"], arrays)
    return (y, _state_of_blocks(geometry, results["final_state"], arrays)), results.get("checkpoints")


def _scan_backward(options: _Options, residuals, cotangents):
    arrays, segment_ids, checkpoints = residuals
    dy, dfinal_state = cotangents
    geometry = options.geometry
    inputs = _prepare(options, arrays, segment_ids)
    inputs |= {
        "dy": _padded_sequence(geometry, dy),
        "checkpoints": checkpoints,
        "dfinal_state": _state_in_blocks(geometry, dfinal_state),
    }
    dtypes = {f"d{name}": arrays[name].dtype for name in _SEQUENCES if name in arrays}
    wide = ("dmatrices", "dinitial_state", "dA", *(f"d{name}" for name in ("D", "dt_bias") if name in arrays))
    dtypes |= dict.fromkeys(wide, jnp.dtype(jnp.float32))
    results = _call(options, pallas_tpu_backward, inputs, dtypes, checkpoints=False, is_reversed=True)
    return _gradients(geometry, arrays, results)


_scan = differentiable(
    _scan_outputs, forward=_scan_forward, backward=_scan_backward, tangent=no_forward_mode(OP, "pallas_tpu")
)


def _call(
    options: _Options,
    module: ModuleType,
    inputs: Arrays,
    dtypes: dict[str, jnp.dtype],
    *,
    checkpoints: bool,
    is_reversed: bool,
) -> Arrays:
    """Runs the kernel of a module; `dtypes` names the outputs."""
    geometry = options.geometry
    features = Features(softplus=options.dt_softplus, checkpoints=checkpoints)
    scratch = module.scratch_shapes(geometry)
    names = [*inputs, *dtypes, *scratch]

    def body(*refs):
        module.kernel(geometry, features, dict(zip(names, refs, strict=True)))

    def specs(names):
        return [geometry.spec(_KINDS[name], is_reversed=is_reversed) for name in names]

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
        name=f"{OP}_pallas_tpu_{module.__name__.rsplit('.', 1)[-1]}",
    )(*inputs.values())
    return dict(zip(dtypes, results, strict=True))


def _prepare(options: _Options, arrays: Arrays, segment_ids: jax.Array | None) -> Arrays:
    """The inputs of both kernels, padded to whole blocks; tokens that do not exist leave the state as it is."""
    geometry = options.geometry
    inputs = {name: _padded_sequence(geometry, arrays[name]) for name in ("x", "z") if name in arrays}
    inputs["dt"] = _padded_sequence(geometry, arrays["dt"], tail=_NEVER if options.dt_softplus else 0.0)
    inputs["matrices"] = _matrices(geometry, arrays["B"], arrays["C"], segment_ids)
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


def _unpadded_sequence(geometry: Geometry, array: jax.Array, arrays: Arrays) -> jax.Array:
    """The inverse of `_padded_sequence`, for the sizes of x."""
    _, length, channels = arrays["x"].shape
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


def _state_of_blocks(geometry: Geometry, array: jax.Array, arrays: Arrays) -> jax.Array:
    """The inverse of `_state_in_blocks`, for the sizes of A."""
    channels, states = arrays["A"].shape
    array = jnp.swapaxes(array, 1, 2).reshape(array.shape[0], geometry.states, geometry.width)
    array = unpad_channels(array, groups=geometry.groups, channels=channels)
    return jnp.swapaxes(array[:, :states], 1, 2)


def _gradients(geometry: Geometry, arrays: Arrays, results: Arrays) -> Arrays:
    """The kernel's results as gradients of the arguments; sums over the batch and over strips are made here."""
    gradients = {
        name: _unpadded_sequence(geometry, results[f"d{name}"], arrays) for name in _SEQUENCES if name in arrays
    }
    gradients["A"] = _state_of_blocks(geometry, results["dA"].sum(axis=0, keepdims=True), arrays)[0]
    if "state" in arrays:
        gradients["state"] = _state_of_blocks(geometry, results["dinitial_state"], arrays)
    for name in ("D", "dt_bias"):
        if name in arrays:
            total = results[f"d{name}"].sum(axis=(0, 2)).reshape(-1)
            gradients[name] = unpad_channels(total, groups=geometry.groups, channels=arrays["x"].shape[2])
    batch, length = arrays["x"].shape[:2]
    shape = batch, geometry.groups, geometry.strips_per_group, geometry.length, 2, geometry.states
    dmatrices = results["dmatrices"].reshape(shape).sum(axis=2)
    for kind, name in enumerate(("B", "C")):
        matrix = arrays[name]
        gradient = jnp.swapaxes(dmatrices[:, :, :length, kind, : matrix.shape[-1]], 1, 2)
        if matrix.ndim == 3 or matrix.shape[2] != geometry.groups:
            gradient = gradient.sum(axis=2, keepdims=True)
        gradients[name] = gradient.reshape(matrix.shape)
    return {name: gradient.astype(arrays[name].dtype) for name, gradient in gradients.items()}
