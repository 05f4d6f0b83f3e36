"""What every implementation of the causal convolution takes and returns."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from pallas_kernels.common.array_types import Leaf
from pallas_kernels.common.checks import require, require_float, require_integer, require_shape

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


# Letters of the dimensions of the arguments, for `pallas_kernels.common.partitioning`; W is K - 1.
DIMENSIONS = {"x": "BLE", "weight": "KE", "bias": "E", "initial_window": "BWE", "segment_ids": "BL"}


def check_arguments(arrays: Mapping[str, Any], *, activation: str | None) -> None:
    """Raises ValueError, in one line, for arguments outside the signature."""
    x, weight = arrays["x"], arrays["weight"]
    require(x.ndim == 3 and 0 not in x.shape, f"{OP}: x has shape {x.shape}, expected non-empty (B, L, E)")
    batch, length, channels = x.shape
    require(
        weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == channels,
        f"{OP}: weight has shape {weight.shape}, expected (K, E) with E = {channels} as in x",
    )
    require_shape(OP, "bias", arrays["bias"], (channels,), meaning="(E,)")
    window_shape = (batch, weight.shape[0] - 1, channels)
    require_shape(OP, "initial_window", arrays["initial_window"], window_shape, meaning="(B, K - 1, E)")
    require_shape(OP, "segment_ids", arrays["segment_ids"], (batch, length), meaning="(B, L)")
    require_float(OP, **{name: arrays[name] for name in ("x", "weight", "bias", "initial_window")})
    require_integer(OP, segment_ids=arrays["segment_ids"])
    require(activation in (None, "silu"), f"{OP}: unknown activation {activation!r}; choose None or 'silu'")
