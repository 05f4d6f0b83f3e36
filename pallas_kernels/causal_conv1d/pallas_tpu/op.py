"""The causal convolution as Pallas kernels for TPUs: the arguments brought into the kernels' shape.

XLA adds up the gradients of weight and bias over the batch.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.causal_conv1d.arguments import Activation, ConvArguments, ConvOutput
from pallas_kernels.causal_conv1d.outside_kernels import (
    add_gradient_of_final_window,
    decline_unusual,
    final_window,
    with_defaults,
)
from pallas_kernels.causal_conv1d.pallas_tpu import kernel
from pallas_kernels.causal_conv1d.pallas_tpu.geometry import Geometry, choose_geometry
from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.checks import decline_off_tpu
from pallas_kernels.common.derivatives import differentiable_op, no_forward_mode
from pallas_kernels.common.devices import target_platform
from pallas_kernels.common.partitioning import result_type
from pallas_kernels.common.segments import count_segments
from pallas_kernels.common.tpu_tiles import LANES, SPAN, SUBLANES, Refs

INTERPRETER = pltpu.InterpretParams()
_VMEM_BYTES = 15 * 2**20


def causal_conv1d(arguments: ConvArguments) -> ConvOutput:
    """See `pallas_kernels.causal_conv1d.api.causal_conv1d`; on a CPU the kernels are interpreted, which is slow.

    Raises:
        NotImplementedError: the target is not a TPU or several without `jax.shard_map`, a size is a symbol, the filter
            has more than 8 taps, or a dtype is neither float32 nor bfloat16.
    """
    decline_off_tpu(arguments.op)
    decline_unusual("pallas_tpu", arguments)
    return _convolve(target_platform() == "cpu", with_defaults(arguments))


def _convolve_outputs(interpreted: bool, arguments: ConvArguments) -> ConvOutput:
    """The result alone. The forward pass keeps nothing, so calls without gradients run the same kernel."""
    return _convolve_forward(interpreted, arguments)[0]


def _convolve_forward(interpreted: bool, arguments: ConvArguments) -> tuple[ConvOutput, None]:
    """The result, and None: the backward kernel computes pre-activations again from the arguments.

    The kernel computes y (B, L, E) of padded sizes, of which the call's own L and E are cut out. XLA takes final_window
    (B, K - 1, E) from the inputs.
    """
    x, window = arguments.x, arguments.initial_window
    assert window is not None  # Filled in by `with_defaults`.
    geometry, inputs, kinds = _prepare(arguments)
    outputs = {"y": ("sequence", x.dtype)}
    scratch = {"inputs": (geometry.tiles, SUBLANES + SPAN, LANES)}
    run = _kernel(kernel.forward, arguments.activation, geometry, interpreted, is_reversed=False)
    results = run(inputs, kinds, outputs, scratch)
    y = results["y"][:, : x.shape[1], : x.shape[2]]
    return ConvOutput(y=y, final_window=final_window(x, window, arguments.segment_ids)), None


def _convolve_backward(interpreted: bool, arguments: ConvArguments, kept: None, cotangents: ConvOutput) -> Arrays:
    """Gradients by name of what may be differentiated: x, the initial window, weight and bias.

    The kernel walks from the last chunk to the first and writes, with padded sizes, dx (B, L, E); in "dtaps"
    (B, K + 1, 8, E) terms of the gradients of the K taps and of the bias, summed here over B and 8; in "dfirst"
    (B, 8, E) the gradients by the pre-activations of the first tokens, which give the window's; and in "dtail"
    dx of the last two spans that have tokens, before rounding, to which the gradient of the final window is added.
    """
    del kept
    x, weight, window, ids = arguments.x, arguments.weight, arguments.initial_window, arguments.segment_ids
    assert window is not None  # Filled in by `with_defaults`.
    geometry, inputs, kinds = _prepare(arguments)
    inputs |= {"dy": _padded(geometry, cotangents.y), "span_before": inputs["x"]}
    kinds |= {"dy": "sequence", "span_before": "span before"}
    outputs = {
        "dx": ("sequence", x.dtype),
        "dtaps": ("sums", jnp.float32),
        "dfirst": ("before", jnp.float32),
        "dtail": ("tail", jnp.float32),
    }
    around = geometry.tiles, SUBLANES + SPAN, LANES
    scratch = {"inputs": around, "gradients": around, "dx_of_span": (SPAN, geometry.tiles * LANES)}
    run = _kernel(kernel.backward, arguments.activation, geometry, interpreted, is_reversed=True)
    results = run(inputs, kinds, outputs, scratch)
    length, channels = x.shape[1:]
    dx = results["dx"][:, :length, :channels]
    dwindow = jnp.zeros(window.shape, jnp.float32)
    if geometry.past:
        dwindow = _gradient_of_window(results["dfirst"][:, :, :channels], weight, ids)
        first = max(0, length - geometry.past) - SPAN * (geometry.last_span - 1)
        dtail = results["dtail"][:, first : first + min(length, geometry.past), :channels]
        dtail = jnp.pad(dtail, ((0, 0), (geometry.past - dtail.shape[1], 0), (0, 0)))
        dx, dwindow = add_gradient_of_final_window(dx, dtail, dwindow, cotangents.final_window, ids)
    dtaps = results["dtaps"].sum(axis=(0, 2))[:, :channels]
    return {"x": dx, "initial_window": dwindow, "weight": dtaps[:-1], "bias": dtaps[-1]}


_convolve = differentiable_op(
    _convolve_outputs,
    forward=_convolve_forward,
    backward=_convolve_backward,
    tangent=no_forward_mode("causal_conv1d", "pallas_tpu"),
)


def _gradient_of_window(dfirst: jax.Array, weight: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """(B, K - 1, E) from the gradients by the pre-activations of the first 8 tokens, zero where there is none."""
    past = weight.shape[0] - 1
    if segment_ids is not None:
        is_first = count_segments(segment_ids, 0)[:, :past] == 0
        is_first = jnp.pad(is_first, ((0, 0), (0, SUBLANES - is_first.shape[1])))
        dfirst = jnp.where(is_first[:, :, None], dfirst, 0.0)
    weight = weight.astype(jnp.float32)
    rows = [sum(weight[tap][None] * dfirst[:, row - tap] for tap in range(row + 1)) for row in range(past)]
    return jnp.stack(rows, axis=1)


def _padded(geometry: Geometry, array: jax.Array) -> jax.Array:
    """(B, up to L, up to E), padded with zeros."""
    padding = geometry.length - array.shape[1], geometry.channels - array.shape[2]
    return jnp.pad(array, ((0, 0), *((0, size) for size in padding)))


def _prepare(arguments: ConvArguments) -> tuple[Geometry, Arrays, dict[str, str]]:
    """Sizes, and the inputs of both kernels with their kinds."""
    x, weight, bias, window = arguments.x, arguments.weight, arguments.bias, arguments.initial_window
    # Both are filled in by `with_defaults`.
    assert bias is not None
    assert window is not None
    batch, length, channels = x.shape
    geometry = choose_geometry(batch=batch, length=length, channels=channels, width=weight.shape[0])
    padding = ((0, 0), (0, geometry.channels - channels))
    taps = jnp.concatenate([weight.astype(jnp.float32), bias.astype(jnp.float32)[None]])
    before = jnp.pad(window.astype(jnp.float32), ((0, 0), (SUBLANES - geometry.past, 0), padding[1]))
    inputs = {"x": _padded(geometry, x), "taps": jnp.pad(taps, padding), "before": before}
    if arguments.segment_ids is not None and geometry.past:
        inputs["masks"] = _masks(geometry, arguments.segment_ids)
    return geometry, inputs, {"x": "sequence", "taps": "taps", "before": "before", "masks": "masks"}


def _masks(geometry: Geometry, segment_ids: jax.Array) -> jax.Array:
    """(B, L, 2 (K - 1)): whether the token 1, 2, ... before is of the same segment, and the token 1, 2, ... after."""
    past, length = geometry.past, geometry.valid_length
    segments = count_segments(segment_ids, past)
    before = [segments[:, past:] == segments[:, past - shift : past - shift + length] for shift in range(1, past + 1)]
    after = [jnp.pad(mask[:, shift:], ((0, 0), (0, min(shift, length)))) for shift, mask in enumerate(before, 1)]
    masks = jnp.stack([*before, *after], axis=-1).astype(jnp.float32)
    return jnp.pad(masks, ((0, 0), (0, geometry.length - length), (0, 0)))


def _kernel(
    body: Callable[[Geometry, Activation | None, Refs], None],
    activation: Activation | None,
    geometry: Geometry,
    interpreted: bool,
    *,
    is_reversed: bool,
) -> Callable[..., Arrays]:
    """A kernel over all blocks, of inputs, kinds of inputs, kinds and dtypes of outputs, and shapes of scratch."""

    def run(
        inputs: Arrays,
        kinds: Mapping[str, str],
        outputs: Mapping[str, tuple[str, jnp.dtype]],
        scratch: Mapping[str, tuple[int, ...]],
    ) -> Arrays:
        names = [*inputs, *outputs, *scratch]

        def on_refs(*refs):
            body(geometry, activation, dict(zip(names, refs, strict=True)))

        results = pl.pallas_call(
            on_refs,
            grid=geometry.grid,
            in_specs=[geometry.spec(kinds[name], is_reversed=is_reversed) for name in inputs],
            out_specs=[geometry.spec(kind, is_reversed=is_reversed) for kind, _ in outputs.values()],
            out_shape=[result_type(inputs["x"], geometry.shape(kind), dtype) for kind, dtype in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
            ),
            interpret=INTERPRETER if interpreted else False,
            name=f"causal_conv1d_pallas_tpu_{body.__name__}",
        )(*inputs.values())
        return dict(zip(outputs, results, strict=True))

    return run
