"""The causal convolution as Mosaic GPU kernels, for Hopper and newer: the arguments brought into the kernels' shape.

XLA adds up the gradients of weight and bias over the runs of tokens that the kernels sum alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.arguments import Activation, ConvArguments, ConvOutput
from pallas_kernels.causal_conv1d.outside_kernels import (
    add_gradient_of_final_window,
    decline_unusual,
    final_window,
    with_defaults,
)
from pallas_kernels.causal_conv1d.pallas_gpu import kernel
from pallas_kernels.causal_conv1d.pallas_gpu.kernel import COLUMNS, RUNS, Thread, Walk, runs_of_row
from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.derivatives import differentiable_op, no_forward_mode
from pallas_kernels.common.devices import cuda_compute_capability, target_platform
from pallas_kernels.common.rounding import ceil_div
from pallas_kernels.common.segments import count_segments
from pallas_kernels.common.warpgroup import Warpgroup, launch

FORWARD = Walk(channels=8, tokens=64, ahead=4)
BACKWARD = Walk(channels=4, tokens=64, ahead=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """How a call runs."""

    interpreted: bool
    forward: Walk
    backward: Walk


def causal_conv1d(arguments: ConvArguments, *, walks: tuple[Walk, Walk] = (FORWARD, BACKWARD)) -> ConvOutput:
    """See `pallas_kernels.causal_conv1d.api.causal_conv1d`; on a CPU the kernels are interpreted, which is slow.

    `walks` says how the work of the forward and the backward pass is spread.

    Raises:
        NotImplementedError: the target is not a GPU of compute capability 9.0 or more, the filter has more than 8 taps,
            or a dtype is neither float32 nor bfloat16.
    """
    if target_platform() != "cpu" and (cuda_compute_capability() or 0) < 90:
        raise NotImplementedError(f"{arguments.op}: 'pallas_gpu' needs an NVIDIA GPU of compute capability 9.0 or more")
    decline_unusual("pallas_gpu", arguments)
    options = _Options(interpreted=target_platform() == "cpu", forward=walks[0], backward=walks[1])
    return _convolve(options, with_defaults(arguments))


def _convolve_outputs(options: _Options, arguments: ConvArguments) -> ConvOutput:
    """The result alone, where nobody asks for gradients; the kernel is the same, as it keeps nothing."""
    return _convolve_forward(options, arguments)[0]


def _convolve_forward(options: _Options, arguments: ConvArguments) -> tuple[ConvOutput, None]:
    """The result, and None: the backward kernel needs nothing but the arguments (see `differentiable_op`).

    The kernel computes y as rows (B L, E padded to a multiple of walk.channels). XLA takes final_window (B, K - 1, E)
    from the inputs.
    """
    x, window = arguments.x, arguments.initial_window
    assert window is not None  # Filled in by `with_defaults`.
    inputs = _prepare(options.forward, arguments)
    outputs = {"y": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype)}
    results = _call(options, kernel.forward, options.forward, arguments, inputs, outputs)
    y = results["y"][:, : x.shape[2]].reshape(x.shape)
    return ConvOutput(y=y, final_window=final_window(x, window, arguments.segment_ids)), None


def _convolve_backward(options: _Options, arguments: ConvArguments, kept: None, cotangents: ConvOutput) -> Arrays:
    """Gradients of x, the initial window, weight and bias, from the cotangents of y and of the final window.

    The kernel writes rows of padded channels: dx (B L, E); for every run of tokens its share of dweight (runs K, E)
    and dbias (runs, E), which XLA adds up; and, if K > 1, the gradients of the window and of the last
    K - 1 inputs in float32, to which XLA adds the gradient of the final window (see `add_gradient_of_final_window`).
    """
    del kept
    x, weight, window = arguments.x, arguments.weight, arguments.initial_window
    assert window is not None  # Filled in by `with_defaults`.
    walk, past = options.backward, weight.shape[0] - 1
    inputs = _prepare(walk, arguments)
    inputs["dy"] = _padded_rows(walk, cotangents.y)
    runs = x.shape[0] * runs_of_row(walk, x.shape[1] + past)
    columns = inputs["x"].shape[1]
    outputs = {
        "dx": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype),
        "dweight": jax.ShapeDtypeStruct((runs * weight.shape[0], columns), jnp.float32),
        "dbias": jax.ShapeDtypeStruct((runs, columns), jnp.float32),
    }
    if past:
        edge = jax.ShapeDtypeStruct((x.shape[0] * past, columns), jnp.float32)
        outputs |= {"dwindow": edge, "dtail": edge}
    results = _call(options, kernel.backward, walk, arguments, inputs, outputs, extra_tokens=past)
    channels = x.shape[2]
    dx = results["dx"][:, :channels].reshape(x.shape)
    dwindow = jnp.zeros(window.shape, jnp.float32)
    if past:
        dwindow, dtail = (results[name][:, :channels].reshape(window.shape) for name in ("dwindow", "dtail"))
        dx, dwindow = add_gradient_of_final_window(dx, dtail, dwindow, cotangents.final_window, arguments.segment_ids)
    dweight = results["dweight"].reshape(runs, weight.shape[0], columns).sum(axis=0)[:, :channels]
    dbias = results["dbias"].sum(axis=0)[:channels]
    return {"x": dx, "initial_window": dwindow, "weight": dweight, "bias": dbias}


_convolve = differentiable_op(
    _convolve_outputs,
    forward=_convolve_forward,
    backward=_convolve_backward,
    tangent=no_forward_mode("causal_conv1d", "pallas_gpu"),
)


def _padded_rows(walk: Walk, array: jax.Array) -> jax.Array:
    """(..., E) to (rows, E), with zero channels up to a multiple of a thread's."""
    padding = -array.shape[-1] % walk.channels
    array = jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, padding),))
    return array.reshape(-1, array.shape[-1])


def _prepare(walk: Walk, arguments: ConvArguments) -> Arrays:
    """The kernels' inputs: rows of channels, and the number of segment starts up to each token."""
    bias, window = arguments.bias, arguments.initial_window
    # Both are filled in by `with_defaults`.
    assert bias is not None
    assert window is not None
    inputs = {"x": _padded_rows(walk, arguments.x), "weight": _padded_rows(walk, arguments.weight.astype(jnp.float32))}
    inputs["bias"] = _padded_rows(walk, bias.astype(jnp.float32)[None])
    if window.shape[1]:
        inputs["window"] = _padded_rows(walk, window)
    if arguments.segment_ids is not None:
        inputs["segments"] = count_segments(arguments.segment_ids, 0).reshape(-1, 1)
    return inputs


def _call(
    options: _Options,
    body: Callable[[Thread, Activation | None], None],
    walk: Walk,
    arguments: ConvArguments,
    inputs: Arrays,
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    extra_tokens: int = 0,
) -> Arrays:
    """Runs a kernel over every run of tokens."""
    shape = arguments.x.shape
    runs = shape[0] * runs_of_row(walk, shape[1] + extra_tokens)
    columns = ceil_div(inputs["x"].shape[1], COLUMNS * walk.channels)

    def run(w: Warpgroup, inputs, outputs, scratch):
        del scratch
        body(Thread(w, walk, shape, extra_tokens, inputs, outputs), arguments.activation)

    return launch(
        run,
        inputs=inputs,
        outputs=outputs,
        scratch={},
        grid={"column": columns, "run": ceil_div(runs, RUNS)},
        name=f"causal_conv1d_{body.__name__}",
        interpreted=options.interpreted,
    )
