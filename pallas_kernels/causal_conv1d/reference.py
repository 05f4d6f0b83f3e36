"""The causal convolution, token by token and straight from its equation: the oracle of every other implementation.

It computes in float64 if an argument has that precision and in float32 otherwise.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.arguments import ConvArguments, ConvOutput


def causal_conv1d(arguments: ConvArguments) -> ConvOutput:
    """See `pallas_kernels.causal_conv1d.api.causal_conv1d`."""
    x, weight, segment_ids = arguments.x, arguments.weight, arguments.segment_ids
    batch, length, channels = x.shape
    width = weight.shape[0]
    is_double = any(array.dtype == jnp.float64 for array in arguments.arrays().values())
    real = jnp.float64 if is_double else jnp.float32
    initial_window = arguments.initial_window
    if initial_window is None:
        initial_window = jnp.zeros_like(x, shape=(batch, width - 1, channels))
    window_BKE = initial_window.astype(x.dtype).astype(real)
    is_start_LB = jnp.zeros((length, batch), bool)
    if segment_ids is not None:
        is_start_LB = is_start_LB.at[1:].set(segment_ids.T[1:] != segment_ids.T[:-1])

    def step(window_BKE, inputs):
        x_BE, is_start_B = inputs
        window_BKE = jnp.where(is_start_B[:, None, None], 0, window_BKE)
        window_BKE = jnp.concatenate([window_BKE, x_BE[:, None]], axis=1)
        y_BE = jnp.sum(weight.astype(real)[None] * window_BKE, axis=1)
        return window_BKE[:, 1:], y_BE

    window_BKE, y_LBE = jax.lax.scan(step, window_BKE, (jnp.moveaxis(x, 1, 0).astype(real), is_start_LB))
    if (bias := arguments.bias) is not None:
        y_LBE = y_LBE + bias.astype(real)[None, None, :]
    if arguments.activation == "silu":
        y_LBE = jax.nn.silu(y_LBE)
    return ConvOutput(y=jnp.moveaxis(y_LBE, 0, 1).astype(x.dtype), final_window=window_BKE.astype(x.dtype))
