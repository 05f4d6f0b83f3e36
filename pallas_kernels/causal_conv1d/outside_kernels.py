"""Code around the Pallas kernels of the convolution, shared by GPU and TPU and compiled by XLA.

It declines calls that the kernels do not take, fills in default arguments, and computes the window after the sequence
and its gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.arguments import ConvArguments
from pallas_kernels.common.checks import decline_symbolic_sizes
from pallas_kernels.common.segments import count_segments

# The largest K that both kernels take: on TPUs the K - 1 tokens before a span must fit into one tile of 8 rows. On GPUs
# the last K inputs of a thread's channels stay in registers.
MAX_WIDTH = 8


def decline_unusual(implementation: str, arguments: ConvArguments) -> None:
    """Raises NotImplementedError, with the reason, for arguments that the Pallas kernels do not take."""
    op, weight = arguments.op, arguments.weight
    decline_symbolic_sizes(op, implementation, arguments.x, weight)
    if weight.shape[0] > MAX_WIDTH:
        raise NotImplementedError(f"{op}: {implementation!r} takes at most {MAX_WIDTH} taps, got {weight.shape[0]}")
    for name, array in arguments.operands()[0].arrays().items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{op}: {implementation!r} takes float32 and bfloat16, {name} has {array.dtype}")


def with_defaults(arguments: ConvArguments) -> ConvArguments:
    """The arguments with zeros for a missing initial window or bias; the window is rounded to the dtype of x."""
    x, bias, window = arguments.x, arguments.bias, arguments.initial_window
    if window is None:
        window = jnp.zeros_like(x, shape=(x.shape[0], arguments.weight.shape[0] - 1, x.shape[2]))
    bias = jnp.zeros((x.shape[2],), jnp.float32) if bias is None else bias
    return dataclasses.replace(arguments, initial_window=window.astype(x.dtype), bias=bias)


def final_window(x: jax.Array, window: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The last K - 1 inputs, (B, K - 1, E), zero where they belong to an earlier segment than the last token.

    Args:
        x: (B, L, E) inputs.
        window: (B, K - 1, E) inputs before the sequence, which are among the last K - 1 if L is less.
        segment_ids: (B, L), or None for a single segment.
    """
    past, length = window.shape[1], x.shape[1]
    final = jnp.concatenate([window, x[:, max(0, length - past) :]], axis=1)
    return current(final[:, final.shape[1] - past :], length, segment_ids)


def current(window: jax.Array, length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Sets to zero the rows of `window` whose token belongs to an earlier segment than the last token.

    Args:
        window: (B, K - 1, E) values of the last K - 1 tokens.
        length: L.
        segment_ids: (B, L), or None for a single segment.
    """
    if segment_ids is None:
        return window
    segments = count_segments(segment_ids, window.shape[1])
    is_current = segments[:, length:] == segments[:, -1:]
    return jnp.where(is_current[:, :, None], window, jnp.zeros_like(window))


def add_gradient_of_final_window(
    dx: jax.Array,
    dtail: jax.Array,
    dwindow: jax.Array,
    dfinal_window: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Adds the gradient of the final window to the gradients of x and of the initial window.

    The final window copies the last inputs, so its gradient is added to theirs. The kernels give these last gradients
    of x a second time in float32, so that the sum is rounded only once.

    Args:
        dx: (B, L, E) gradient of x through y, in the dtype of x.
        dtail: (B, K - 1, E) float32; its last min(L, K - 1) rows are the last rows of dx before rounding.
        dwindow: (B, K - 1, E) float32, gradient of the initial window through y.
        dfinal_window: (B, K - 1, E) gradient of the final window.
        segment_ids: (B, L), or None for a single segment.

    Returns:
        The whole gradients of x, in its dtype, and of the initial window, in float32.
    """
    past, length = dwindow.shape[1], dx.shape[1]
    dfinal = current(dfinal_window, length, segment_ids).astype(jnp.float32)
    tokens = min(length, past)
    dwindow = dwindow.at[:, length:].add(dfinal[:, : past - tokens])
    dtail = (dtail + dfinal)[:, past - tokens :]
    return dx.at[:, length - tokens :].set(dtail.astype(dx.dtype)), dwindow
