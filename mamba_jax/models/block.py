"""The residual block."""

import jax
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layers import RMSNorm
from mamba_jax.models.mixers.mamba1.mixer import Mamba1
from mamba_jax.models.state import Mamba1State
from mamba_jax.sharding import Axis, constrain


class Block(nnx.Module):
    """Pre-norm residual block: r + mixer(norm(r)), with the residual stream r in float32."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps, param_dtype=config.param_dtype, rngs=rngs)
        self.mixer = Mamba1(config, rngs=rngs)
        self.compute_dtype = config.compute_dtype

    def __call__(
        self,
        residual_BLD: Float[jax.Array, "B L D"],
        state: Mamba1State | None = None,
        segment_ids_BL: Int[jax.Array, "B L"] | None = None,
    ) -> tuple[Float[jax.Array, "B L D"], Mamba1State]:
        """Returns the residual stream after the block, and the mixer's state after the last token."""
        normed_BLD = self.norm(residual_BLD, dtype=self.compute_dtype)
        update = self.mixer.advance(normed_BLD, state, segment_ids_BL)
        residual_BLD = residual_BLD + update.y.astype(residual_BLD.dtype)
        return constrain(residual_BLD, Axis.BATCH, Axis.LENGTH, None), update.state
