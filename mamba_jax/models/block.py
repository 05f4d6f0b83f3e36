"""The residual block."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models.layers import RMSNorm
from mamba_jax.models.mixers.declaration import MixerConfig, Setting
from mamba_jax.sharding import Axis, constrain


class Block(nnx.Module):
    """Pre-norm residual block: r + mixer(norm(r)), with the residual stream r in float32."""

    def __init__(self, mixer: MixerConfig, setting: Setting, *, norm_eps: float, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(setting.d_model, eps=norm_eps, param_dtype=setting.param_dtype, rngs=rngs)
        build: Any = mixer.mixer()
        self.mixer = build(mixer, **dataclasses.asdict(setting), rngs=rngs)
        self.compute_dtype = setting.compute_dtype

    def __call__(
        self,
        residual_BLD: Float[jax.Array, "B L D"],
        state: Any = None,
        segment_ids_BL: Int[jax.Array, "B L"] | None = None,
    ) -> tuple[Float[jax.Array, "B L D"], Any]:
        """Returns the residual stream after the block, and the mixer's state after the last token."""
        normed_BLD = self.norm(residual_BLD, dtype=self.compute_dtype)
        update = self.mixer.advance(normed_BLD, state, segment_ids_BL)
        residual_BLD = residual_BLD + update.y.astype(residual_BLD.dtype)
        return constrain(residual_BLD, Axis.BATCH, Axis.LENGTH, None), update.state
