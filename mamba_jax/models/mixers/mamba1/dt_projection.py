"""The projection to the step size."""

import jax
from flax import nnx
from jaxtyping import Float

from mamba_jax.models import initializers
from mamba_jax.models.layers import parameter, read
from mamba_jax.sharding import Axis, product


class DtProjection(nnx.Module):
    """Low-rank projection to the step size, (R, E); its bias is added, in float32, inside the scan's softplus."""

    def __init__(
        self,
        rank: int | None,
        channels: int,
        *,
        kernel_init: initializers.Initializer,
        bias_init: initializers.Initializer,
        param_dtype: str,
        compute_dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        axes = (Axis.DT_RANK, Axis.INNER)
        if rank is not None:
            self.kernel = parameter(rngs, kernel_init, (rank, channels), axes, dtype=param_dtype, decay=True)
        self.bias = parameter(rngs, bias_init, (channels,), axes[1:], dtype=param_dtype, decay=False)
        self.compute_dtype = compute_dtype

    def __call__(self, dt_BLR: Float[jax.Array, "B L R"]) -> Float[jax.Array, "B L E"]:
        """The step size before its bias, in the compute dtype."""
        return product(dt_BLR, read(self.kernel).astype(self.compute_dtype))
