"""The short convolution of a mixer."""

from typing import Literal

import jax
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import initializers, ops
from mamba_jax.models.layers import parameter, read
from mamba_jax.sharding import Axis
from pallas_kernels import ConvOutput


class CausalConv1d(nnx.Module):
    """Depthwise causal convolution and an activation: `weight` (K, E), tap K - 1 for the current token, and `bias`.

    Both are uniform within +-1 / sqrt(K) at first, unless `weight_init` and `bias_init` say otherwise.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int = 4,
        use_bias: bool = True,
        weight_init: initializers.Initializer | None = None,
        bias_init: initializers.Initializer | None = None,
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        init, axes = initializers.fan_in(width), (Axis.CONV, Axis.INNER)
        self.weight = parameter(rngs, weight_init or init, (width, channels), axes, dtype=param_dtype, decay=True)
        self.has_bias = use_bias
        if use_bias:
            self.bias = parameter(rngs, bias_init or init, (channels,), axes[1:], dtype=param_dtype, decay=False)

    def __call__(
        self,
        x_BLE: Float[jax.Array, "B L E"],
        window_BWE: Float[jax.Array, "B W E"] | None = None,
        segment_ids_BL: Int[jax.Array, "B L"] | None = None,
        *,
        activation: Literal["silu"] | None = "silu",
    ) -> ConvOutput:
        """Convolves, applies the activation, and returns the window that continues the sequence besides the output."""
        return ops.causal_conv1d(
            # A kernel's launch takes longer than a single token does, which XLA computes along with its neighbours.
            implementation="xla" if x_BLE.shape[1] == 1 else None,
            x=x_BLE,
            weight=read(self.weight),
            bias=read(self.bias) if self.has_bias else None,
            initial_window=window_BWE,
            segment_ids=segment_ids_BL,
            activation=activation,
            past=self.weight.shape[0] - 1,
        )
