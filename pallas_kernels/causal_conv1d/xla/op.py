"""The causal convolution in plain JAX, as K shifted multiply-adds.

XLA fuses the sum over taps into one pass over memory on every platform, while its grouped convolution, and above all
the gradient of that, is slow on CPUs. The backward pass keeps only the arguments and recomputes the sum.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.arguments import Activation, ConvArguments, ConvOutput
from pallas_kernels.common.checks import decline_double_precision
from pallas_kernels.common.segments import count_segments


def causal_conv1d(arguments: ConvArguments) -> ConvOutput:
    """See `pallas_kernels.causal_conv1d.api.causal_conv1d`.

    Raises:
        NotImplementedError: an argument is float64.
    """
    decline_double_precision("xla", arguments)
    x, weight, initial_window, ids = arguments.x, arguments.weight, arguments.initial_window, arguments.segment_ids
    past = weight.shape[0] - 1
    if initial_window is None:
        initial_window = jnp.zeros_like(x, shape=(x.shape[0], past, x.shape[2]))
    initial_window = initial_window.astype(x.dtype)
    if x.shape[1] == 1 and ids is None:
        y, final_window = _convolve_token(arguments.activation, x, initial_window, weight, arguments.bias)
    else:
        segments = None if ids is None else count_segments(ids, past)
        y, final_window = _convolve(arguments.activation, x, initial_window, weight, arguments.bias, segments)
    return ConvOutput(y=y, final_window=final_window)


def _convolve_token(
    activation: Activation | None, x: jax.Array, window: jax.Array, weight: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`_convolve` of a single token, (B, 1, E): nothing is put together only to be written and read again."""
    y = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)[None, None, :]
    taps = [*jnp.split(window, window.shape[1], axis=1), x] if window.shape[1] else [x]
    for tap, inputs in enumerate(taps):
        y = y + weight[tap].astype(jnp.float32)[None, None, :] * inputs.astype(jnp.float32)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype), jnp.concatenate([window, x], axis=1)[:, 1:]


@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _convolve(
    activation: Activation | None,
    x: jax.Array,
    initial_window: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Output and final window."""
    # Where layers are scanned, weights are slices of a stack. On a CPU a loop that slices while it computes runs
    # without vector instructions, several times as long.
    weight, bias = jax.lax.optimization_barrier((weight, bias))
    width, length = weight.shape[0], x.shape[1]
    weight = weight.astype(jnp.float32)
    # Widened before it is used, so that all contributions to the gradient of x add up in float32.
    padded = jnp.concatenate([initial_window, x], axis=1).astype(jnp.float32)
    y = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)[None, None, :]
    for tap in range(width):
        inputs = padded[:, tap : tap + length]
        if segments is not None and tap < width - 1:
            is_same = segments[:, tap : tap + length] == segments[:, width - 1 :]
            inputs = jnp.where(is_same[:, :, None], inputs, 0)
        y = y + weight[tap][None, None, :] * inputs
    if activation == "silu":
        y = jax.nn.silu(y)
    final_window = padded[:, length:]
    if segments is not None:
        is_current = segments[:, length:] == segments[:, -1:]
        final_window = jnp.where(is_current[:, :, None], final_window, 0)
    return y.astype(x.dtype), final_window.astype(x.dtype)
