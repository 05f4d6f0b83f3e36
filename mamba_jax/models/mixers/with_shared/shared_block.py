"""The block of attention and an MLP that several layers share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models.layers import RMSNorm
from mamba_jax.models.mixers.attention.mixer import Attention
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.mixers.mixer import MixerOutput
from mamba_jax.models.mixers.mlp.mixer import Mlp
from mamba_jax.models.mixers.with_shared.config import SharedBlockConfig
from mamba_jax.sharding import Axis, constrain


class SharedBlock(nnx.Module):
    r"""What a layer adds to the input of its mixer, computed with weights that other layers use as well.

        s = mlp(norm(attention(norm([r, e]))) + adapter)

    of the residual stream r and the embedded tokens e, beside each other. There is no residual connection inside.

    Source: arXiv 2411.15242, section 2 and figure 1.
    """

    def __init__(
        self,
        config: SharedBlockConfig,
        setting: Setting,
        *,
        norm_eps: float = 1e-5,
        norm_offset: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters.

        Args:
            config: of the block.
            setting: of the model's mixers; its output scale is for what is added to the residual stream, and here
                nothing is.
            norm_eps: of the model's norms.
            norm_offset: of the model's norms.
            rngs: source of keys.
        """
        setting = dataclasses.replace(setting, output_scale=1.0)
        build = {**dataclasses.asdict(setting), "rngs": rngs}
        width = setting.d_model

        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, eps=norm_eps, offset=norm_offset, param_dtype=setting.param_dtype, rngs=rngs)

        self.norm, self.mlp_norm = norm(2 * width), norm(width)
        self.attention = Attention(config.reading(width), **build)
        self.mlp = Mlp(config.mlp, **build)
        self.compute_dtype = setting.compute_dtype

    def __call__(
        self,
        residual_BLD: Float[jax.Array, "B L D"],
        embedded_BLD: Float[jax.Array, "B L D"],
        *,
        adapter: Any,
        state: Any,
        segment_ids_BL: Int[jax.Array, "B L"] | None,
    ) -> MixerOutput:
        """Runs the block.

        Args:
            residual_BLD: residual stream, (B, L, D).
            embedded_BLD: embedded tokens as they entered it, (B, L, D).
            adapter: from the MLP's input to what is added to its first product; None adds nothing.
            state: of the attention, or None.
            segment_ids_BL: document of each token, (B, L), or None.

        Returns:
            s (B, L, D) in the compute dtype, and the attention's state.
        """
        both_BLM = jnp.concatenate([residual_BLD, embedded_BLD.astype(residual_BLD.dtype)], axis=-1)
        both_BLM = constrain(both_BLM, Axis.BATCH, Axis.LENGTH, None)
        attended = self.attention.advance(self.norm(both_BLM, dtype=self.compute_dtype), state, segment_ids_BL)
        normed_BLD = self.mlp_norm(attended.y, dtype=self.compute_dtype)
        projected = self.mlp.up_proj(normed_BLD)
        if adapter is not None:
            projected = projected + adapter(normed_BLD)
        return MixerOutput(y=self.mlp.from_projected(projected), state=attended.state)
