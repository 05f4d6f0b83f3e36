"""What every implementation of the causal convolution takes and returns."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Leaf
from pallas_kernels.checks import require, require_float, require_shape

OP = "causal_conv1d"
Activation = Literal["silu"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvOutput:
    """Result of a causal convolution.

    Attributes:
        y: (B, L, E), dtype of x.
        final_window: (B, K - 1, E), dtype of x: the last K - 1 inputs, zero where they belong to an earlier segment
            than the last token.
    """

    y: Leaf
    final_window: Leaf


def check_arguments(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    activation: str | None,
    initial_window: jax.Array | None,
    segment_ids: jax.Array | None,
) -> None:
    """Raises ValueError, in one line, for arguments outside the signature."""
    require(x.ndim == 3 and 0 not in x.shape, f"{OP}: x has shape {x.shape}, expected non-empty (B, L, E)")
    batch, length, channels = x.shape
    require(
        weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == channels,
        f"{OP}: weight has shape {weight.shape}, expected (K, E) with E = {channels} as in x",
    )
    require_shape(OP, "bias", bias, (channels,), meaning="(E,)")
    window_shape = (batch, weight.shape[0] - 1, channels)
    require_shape(OP, "initial_window", initial_window, window_shape, meaning="(B, K - 1, E)")
    require_shape(OP, "segment_ids", segment_ids, (batch, length), meaning="(B, L)")
    require_float(OP, x=x, weight=weight, bias=bias, initial_window=initial_window)
    require(
        segment_ids is None or jnp.issubdtype(segment_ids.dtype, jnp.integer),
        f"{OP}: segment_ids has dtype {getattr(segment_ids, 'dtype', None)}, expected an integer dtype",
    )
    require(activation in (None, "silu"), f"{OP}: unknown activation {activation!r}; choose None or 'silu'")
