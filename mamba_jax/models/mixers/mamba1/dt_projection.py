"""The projection to the step size."""

import jax
from flax import nnx
from jaxtyping import Float

from mamba_jax.models import initializers
from mamba_jax.models.layers import parameter
from mamba_jax.models.storage.matrix import product_with, read_matrix
from mamba_jax.sharding import Axis


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
            shape = (rank, channels)
            self.kernel = parameter(rngs, kernel_init, shape, axes, dtype=param_dtype, decay=True, summed=0)
        self.bias = parameter(rngs, bias_init, (channels,), axes[1:], dtype=param_dtype, decay=False)
        self.compute_dtype = compute_dtype

    def __call__(self, dt_BLR: Float[jax.Array, "B L R"]) -> Float[jax.Array, "B L E"]:
        """The step size before its bias, in the compute dtype."""
        return product_with(dt_BLR, read_matrix(self.kernel), dtype=self.compute_dtype)
