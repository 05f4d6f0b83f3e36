"""The causal convolution as Pallas kernels for TPUs.

A kernel walks a sequence in groups of 16 tokens, with the 8 tokens before (forward) or the gradients of the 8 after
(backward) next to them in memory on the chip, so that a shift by some tokens is a read from some rows further on. The
backward kernel computes the sum over taps again. The gradients of weight and bias stay on the chip for a whole
sequence; XLA adds up the batch.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.causal_conv1d.arguments import OP, Activation, ConvOutput
from pallas_kernels.causal_conv1d.pallas_tpu.geometry import Geometry, choose_geometry
from pallas_kernels.causal_conv1d.windows import (
    add_gradient_of_final_window,
    decline_unusual,
    final_window,
    with_defaults,
)
from pallas_kernels.causal_conv1d.xla import op as xla
from pallas_kernels.common.checks import decline_off_tpu
from pallas_kernels.common.derivatives import differentiable, no_forward_mode
from pallas_kernels.common.devices import target_platform
from pallas_kernels.common.partitioning import result_type
from pallas_kernels.common.tpu_tiles import (
    GROUP,
    LANES,
    SUBLANES,
    Refs,
    folded,
    group_tokens,
    over,
    sequence,
    sigmoid,
    tile_lanes,
)

Arrays = dict[str, jax.Array]
# x, window, weight and bias.
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
INTERPRETER = pltpu.InterpretParams()
_VMEM_BYTES = 15 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static about a convolution."""

    activation: Activation | None
    interpreted: bool


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    activation: Activation | None,
    initial_window: jax.Array | None,
    segment_ids: jax.Array | None,
) -> ConvOutput:
    """See `pallas_kernels.causal_conv1d.api.causal_conv1d`; on a CPU the kernels are interpreted, which is slow.

    Raises:
        NotImplementedError: the target is no TPU or several without `jax.shard_map`, a size is a symbol, the filter has
            more than 8 taps, or a dtype is neither float32 nor bfloat16.
    """
    decline_off_tpu(OP)
    decline_unusual("pallas_tpu", x, weight, bias, initial_window)
    window, bias = with_defaults(x, weight, bias, initial_window)
    options = _Options(activation=activation, interpreted=target_platform() == "cpu")
    y, last_inputs = _convolve(options, (x, window, weight, bias), segment_ids)
    return ConvOutput(y=y, final_window=last_inputs)


def _convolve_outputs(
    options: _Options, arrays: Operands, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    return _convolve_forward(options, arrays, segment_ids)[0]


def _convolve_forward(options: _Options, arrays: Operands, segment_ids: jax.Array | None):
    x, window, weight, bias = arrays
    geometry, inputs, kinds = _prepare(x, window, weight, bias, segment_ids)
    outputs = {"y": ("sequence", x.dtype)}
    scratch = {"inputs": (geometry.tiles, SUBLANES + GROUP, LANES)}
    results = _call(options, _forward, geometry, inputs, kinds, outputs, scratch, is_reversed=False)
    y = results["y"][:, : x.shape[1], : x.shape[2]]
    return (y, final_window(x, window, segment_ids)), (arrays, segment_ids)


def _convolve_backward(options: _Options, residuals, cotangents):
    (x, window, weight, bias), segment_ids = residuals
    dy, dfinal_window = cotangents
    geometry, inputs, kinds = _prepare(x, window, weight, bias, segment_ids)
    inputs |= {"dy": _padded(geometry, dy), "group_before": inputs["x"]}
    kinds |= {"dy": "sequence", "group_before": "group before"}
    outputs = {
        "dx": ("sequence", x.dtype),
        "dtaps": ("sums", jnp.float32),
        "dfirst": ("before", jnp.float32),
        "dtail": ("tail", jnp.float32),
    }
    around = geometry.tiles, SUBLANES + GROUP, LANES
    scratch = {"inputs": around, "gradients": around, "dx_of_group": (GROUP, geometry.tiles * LANES)}
    results = _call(options, _backward, geometry, inputs, kinds, outputs, scratch, is_reversed=True)
    length, channels = x.shape[1:]
    dx = results["dx"][:, :length, :channels]
    dwindow = jnp.zeros(window.shape, jnp.float32)
    if geometry.past:
        dwindow = _gradient_of_window(results["dfirst"][:, :, :channels], weight, segment_ids)
        first = max(0, length - geometry.past) - GROUP * (geometry.last_group - 1)
        dtail = results["dtail"][:, first : first + min(length, geometry.past), :channels]
        dtail = jnp.pad(dtail, ((0, 0), (geometry.past - dtail.shape[1], 0), (0, 0)))
        dx, dwindow = add_gradient_of_final_window(dx, dtail, dwindow, dfinal_window, segment_ids)
    dtaps = results["dtaps"].sum(axis=(0, 2))[:, :channels]
    return dx, dwindow.astype(window.dtype), dtaps[:-1].astype(weight.dtype), dtaps[-1].astype(bias.dtype)


_convolve = differentiable(
    _convolve_outputs,
    forward=_convolve_forward,
    backward=_convolve_backward,
    tangent=no_forward_mode(OP, "pallas_tpu"),
)


def _gradient_of_window(dfirst: jax.Array, weight: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """(B, K - 1, E) from the gradients by the pre-activations of the first 8 tokens, zero where there is none."""
    past = weight.shape[0] - 1
    if segment_ids is not None:
        is_first = xla.count_segments(segment_ids, 0)[:, :past] == 0
        is_first = jnp.pad(is_first, ((0, 0), (0, SUBLANES - is_first.shape[1])))
        dfirst = jnp.where(is_first[:, :, None], dfirst, 0.0)
    weight = weight.astype(jnp.float32)
    rows = [sum(weight[tap][None] * dfirst[:, row - tap] for tap in range(row + 1)) for row in range(past)]
    return jnp.stack(rows, axis=1)


def _padded(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(B, up to L, up to E), padded with zeros."""
    padding = geometry.length - array.shape[1], geometry.channels - array.shape[2]
    return jnp.pad(array, ((0, 0), *((0, size) for size in padding)))


def _prepare(x, window, weight, bias, segment_ids) -> tuple[Geometry, Arrays, dict[str, str]]:
    """Sizes, and the inputs of both kernels with their kinds."""
    batch, length, channels = x.shape
    geometry = choose_geometry(batch=batch, length=length, channels=channels, width=weight.shape[0])
    padding = ((0, 0), (0, geometry.channels - channels))
    taps = jnp.concatenate([weight.astype(jnp.float32), bias.astype(jnp.float32)[None]])
    before = jnp.pad(window.astype(jnp.float32), ((0, 0), (SUBLANES - geometry.past, 0), padding[1]))
    inputs = {"x": _padded(geometry, x), "taps": jnp.pad(taps, padding), "before": before}
    if segment_ids is not None and geometry.past:
        inputs["masks"] = _masks(geometry, segment_ids)
    return geometry, inputs, {"x": "sequence", "taps": "taps", "before": "before", "masks": "masks"}


def _masks(geometry: Geometry, segment_ids: jax.Array) -> jax.Array:
    """(B, L, 2 (K - 1)): whether the token 1, 2, ... before is of the same segment, and the token 1, 2, ... after."""
    past, length = geometry.past, geometry.valid_length
    segments = xla.count_segments(segment_ids, past)
    before = [segments[:, past:] == segments[:, past - shift : past - shift + length] for shift in range(1, past + 1)]
    after = [jnp.pad(mask[:, shift:], ((0, 0), (0, min(shift, length)))) for shift, mask in enumerate(before, 1)]
    masks = jnp.stack([*before, *after], axis=-1).astype(jnp.float32)
    return jnp.pad(masks, ((0, 0), (0, geometry.length - length), (0, 0)))


def _call(
    options: _Options,
    kernel: Callable[[Geometry, Activation | None, Refs], None],
    geometry: Geometry,
    inputs: Arrays,
    kinds: dict[str, str],
    outputs: dict[str, tuple[str, jnp.dtype]],
    scratch: Mapping[str, tuple[int, ...]],
    *,
    is_reversed: bool,
) -> Arrays:
    """Runs a kernel over all blocks; `outputs` gives kinds and dtypes."""
    names = [*inputs, *outputs, *scratch]

    def body(*refs):
        kernel(geometry, options.activation, dict(zip(names, refs, strict=True)))

    results = pl.pallas_call(
        body,
        grid=geometry.grid,
        in_specs=[geometry.spec(kinds[name], is_reversed=is_reversed) for name in inputs],
        out_specs=[geometry.spec(kind, is_reversed=is_reversed) for kind, _ in outputs.values()],
        out_shape=[result_type(inputs["x"], geometry.shape(kind), dtype) for kind, dtype in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=INTERPRETER if options.interpreted else False,
        name=f"{OP}_pallas_tpu{kernel.__name__}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _mask_columns(geometry: Geometry, refs: Refs, group) -> list[jax.Array] | None:
    """The masks of a group of tokens, each in all lanes."""
    if "masks" not in refs:
        return None
    masks = refs["masks"][group_tokens(group), :]
    return [jnp.broadcast_to(masks[:, i : i + 1], (GROUP, LANES)) for i in range(2 * geometry.past)]


def _shifted_inputs(geometry: Geometry, refs: Refs, tile: int, masks: list[jax.Array] | None) -> list[jax.Array]:
    """Inputs of a group as tap k meets them, zero if of another segment."""
    found = []
    for shift in range(geometry.past, -1, -1):
        rows = refs["inputs"][tile, SUBLANES - shift : SUBLANES - shift + GROUP, :]
        found.append(rows * masks[shift - 1] if masks and shift else rows)
    return found


def _pre_activation(geometry: Geometry, refs: Refs, inputs: list[jax.Array], lanes: slice) -> jax.Array:
    """Bias plus the sum over taps."""
    pre = refs["taps"][geometry.width : geometry.width + 1, lanes] + inputs[0] * refs["taps"][0:1, lanes]
    for tap in range(1, geometry.width):
        pre = pre + inputs[tap] * refs["taps"][tap : tap + 1, lanes]
    return pre


def _forward(geometry: Geometry, activation: Activation | None, refs: Refs) -> None:
    """A block of channels and a chunk of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiles)]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for tile, lanes in enumerate(tiles):
            refs["inputs"][tile, :SUBLANES, :] = refs["before"][:, lanes]

    def advance(group, carry):
        masks = _mask_columns(geometry, refs, group)
        for tile, lanes in enumerate(tiles):
            x = sequence(refs, "x", group, lanes)
            refs["inputs"][tile, SUBLANES:, :] = x
            y = _pre_activation(geometry, refs, _shifted_inputs(geometry, refs, tile, masks), lanes)
            if activation == "silu":
                y = y * sigmoid(y)
            refs["y"][group_tokens(group), lanes] = y.astype(refs["y"].dtype)
            refs["inputs"][tile, :SUBLANES, :] = x[GROUP - SUBLANES :]
        return carry

    over(geometry.groups, advance)


def _backward(geometry: Geometry, activation: Activation | None, refs: Refs) -> None:
    """Gradients of a block of channels and a chunk of tokens, the last chunk first."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiles)]
    step = pl.program_id(2)
    chunk = geometry.chunks - 1 - step

    @pl.when(step == 0)
    def _():
        refs["dtaps"][...] = jnp.zeros_like(refs["dtaps"])
        for tile in range(geometry.tiles):
            refs["gradients"][tile, GROUP:, :] = jnp.zeros((SUBLANES, LANES), jnp.float32)

    def go_back(index, carry):
        group = geometry.groups - 1 - index
        masks = _mask_columns(geometry, refs, group)
        for tile, lanes in enumerate(tiles):
            _go_back_tile(geometry, activation, refs, group, chunk, tile, masks)
            # What the group before it needs of this one.
            refs["gradients"][tile, GROUP:, :] = refs["gradients"][tile, :SUBLANES, :]
            refs["dfirst"][:, lanes] = refs["gradients"][tile, :SUBLANES, :]

        from_end = chunk * geometry.groups + group - (geometry.last_group - 1)

        @pl.when((from_end == 0) | (from_end == 1))
        def _():
            refs["dtail"][group_tokens(from_end), :] = refs["dx_of_group"][...]

        return carry

    over(geometry.groups, go_back)


def _go_back_tile(
    geometry: Geometry,
    activation: Activation | None,
    refs: Refs,
    group,
    chunk,
    tile: int,
    masks: list[jax.Array] | None,
) -> None:
    """Gradients of a group of tokens and a tile."""
    lanes, width = tile_lanes(tile), geometry.width
    within = sequence(refs, "x", jnp.maximum(group - 1, 0), lanes)[GROUP - SUBLANES :]
    across = refs["group_before"][GROUP - SUBLANES :, lanes].astype(jnp.float32)
    across = jnp.where(chunk == 0, refs["before"][:, lanes], across)
    refs["inputs"][tile, :SUBLANES, :] = jnp.where(group == 0, across, within)
    refs["inputs"][tile, SUBLANES:, :] = sequence(refs, "x", group, lanes)
    inputs = _shifted_inputs(geometry, refs, tile, masks)
    gradient = sequence(refs, "dy", group, lanes)
    if activation == "silu":
        pre = _pre_activation(geometry, refs, inputs, lanes)
        gate = sigmoid(pre)
        gradient = gradient * (gate * (1.0 + pre * (1.0 - gate)))
    refs["gradients"][tile, :GROUP, :] = gradient
    for tap in range(width):
        refs["dtaps"][tap, :, lanes] += folded(gradient * inputs[tap])
    refs["dtaps"][width, :, lanes] += folded(gradient)
    dx = gradient * refs["taps"][width - 1 : width, lanes]
    for shift in range(1, width):
        later = refs["gradients"][tile, shift : shift + GROUP, :]
        if masks:
            later = later * masks[geometry.past + shift - 1]
        dx = dx + later * refs["taps"][width - 1 - shift : width - shift, lanes]
    refs["dx_of_group"][:, lanes] = dx
    refs["dx"][group_tokens(group), lanes] = dx.astype(refs["dx"].dtype)
