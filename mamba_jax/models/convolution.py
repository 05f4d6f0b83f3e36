"""The short convolution of a mixer."""

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import initializers, sequence_parallel
from mamba_jax.models.layers import parameter, read
from mamba_jax.sharding import Axis, per_shard
from pallas_kernels import ConvOutput, causal_conv1d

# Logical axes of inputs, of those of a sequence that is not split, and of the inputs before the first token.
SEQUENCE = (Axis.BATCH, Axis.LENGTH, Axis.INNER)
WHOLE_SEQUENCE = (Axis.BATCH, None, Axis.INNER)
_WINDOW = (Axis.BATCH, None, Axis.INNER)


class CausalConv1d(nnx.Module):
    """Depthwise causal convolution and SiLU: `weight` (K, E), tap K - 1 for the current token, and `bias`."""

    def __init__(
        self, channels: int, *, width: int = 4, use_bias: bool = True, param_dtype: str = "float32", rngs: nnx.Rngs
    ) -> None:
        init, axes = initializers.fan_in(width), (Axis.CONV, Axis.INNER)
        self.weight = parameter(rngs, init, (width, channels), axes, dtype=param_dtype, decay=True)
        self.has_bias = use_bias
        if use_bias:
            self.bias = parameter(rngs, init, (channels,), axes[1:], dtype=param_dtype, decay=False)

    def __call__(
        self,
        x_BLE: Float[jax.Array, "B L E"],
        window_BWE: Float[jax.Array, "B W E"] | None = None,
        segment_ids_BL: Int[jax.Array, "B L"] | None = None,
    ) -> ConvOutput:
        """Convolves, applies SiLU, and returns the window that continues the sequence besides the output."""

        def convolve_whole(**arrays: Any) -> tuple[jax.Array, jax.Array]:
            output = causal_conv1d(**arrays, activation="silu")
            return output.y, output.final_window

        is_split = sequence_parallel.is_split(x_BLE.shape[1], past=self.weight.shape[0] - 1)
        sequence = SEQUENCE if is_split else WHOLE_SEQUENCE
        y_BLE, final_window_BWE = per_shard(
            functools.partial(sequence_parallel.convolve, activation="silu") if is_split else convolve_whole,
            {
                "x": x_BLE,
                "weight": read(self.weight),
                "bias": read(self.bias) if self.has_bias else None,
                "initial_window": window_BWE,
                "segment_ids": segment_ids_BL,
            },
            {
                "x": sequence,
                "weight": (Axis.CONV, Axis.INNER),
                "bias": (Axis.INNER,),
                "initial_window": _WINDOW,
                "segment_ids": sequence[:2],
            },
            (sequence, _WINDOW),
        )
        return ConvOutput(y=y_BLE, final_window=final_window_BWE)
