"""What the Pallas kernels of the convolution leave to XLA: the windows before and after the sequence."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.arguments import ConvArguments
from pallas_kernels.common.checks import decline_symbolic_sizes
from pallas_kernels.common.segments import count_segments

MAX_WIDTH = 8


def decline_unusual(implementation: str, arguments: ConvArguments) -> None:
    """Raises NotImplementedError, with the reason, for what the Pallas kernels do not do."""
    op, weight = arguments.op, arguments.weight
    decline_symbolic_sizes(op, implementation, arguments.x, weight)
    if weight.shape[0] > MAX_WIDTH:
        raise NotImplementedError(f"{op}: {implementation!r} takes at most {MAX_WIDTH} taps, got {weight.shape[0]}")
    for name, array in arguments.operands()[0].arrays().items():
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{op}: {implementation!r} takes float32 and bfloat16, {name} has {array.dtype}")


def with_defaults(arguments: ConvArguments) -> ConvArguments:
    """The arguments with an initial window, in the dtype of x, and a bias."""
    x, bias, window = arguments.x, arguments.bias, arguments.initial_window
    if window is None:
        window = jnp.zeros_like(x, shape=(x.shape[0], arguments.weight.shape[0] - 1, x.shape[2]))
    bias = jnp.zeros((x.shape[2],), jnp.float32) if bias is None else bias
    return dataclasses.replace(arguments, initial_window=window.astype(x.dtype), bias=bias)


def final_window(x: jax.Array, window: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The last K - 1 inputs, zero where they belong to an earlier segment than the last token."""
    past, length = window.shape[1], x.shape[1]
    final = jnp.concatenate([window, x[:, max(0, length - past) :]], axis=1)
    return current(final[:, final.shape[1] - past :], length, segment_ids)


def current(window: jax.Array, length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Values of the last K - 1 of `length` tokens, zero for those of an earlier segment than the last one's."""
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
    """Adds the final window's gradient to those of x and of the initial window before they are rounded.

    Args:
        dx: (B, L, E) gradient of x by way of y.
        dtail: (B, K - 1, E) its last tokens in float32, at the end.
        dwindow: (B, K - 1, E) gradient of the initial window by way of y, float32.
        dfinal_window: (B, K - 1, E).
        segment_ids: (B, L).

    Returns:
        The gradients of x and, in float32, of the initial window.
    """
    past, length = dwindow.shape[1], dx.shape[1]
    dfinal = current(dfinal_window, length, segment_ids).astype(jnp.float32)
    tokens = min(length, past)
    dwindow = dwindow.at[:, length:].add(dfinal[:, : past - tokens])
    dtail = (dtail + dfinal)[:, past - tokens :]
    return dx.at[:, length - tokens :].set(dtail.astype(dx.dtype)), dwindow
