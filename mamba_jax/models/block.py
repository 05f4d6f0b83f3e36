"""The residual block."""

import dataclasses
from typing import Any

from flax import nnx

from mamba_jax.models.config import ModelConfig
from mamba_jax.models.layers import RMSNorm
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.mixers.mixer import BlockInput, BlockOutput
from mamba_jax.sharding import Axis, constrain


class Block(nnx.Module):
    """Pre-norm residual block: r + mixer(norm(r)), with the residual stream r in float32."""

    def __init__(self, mixer: MixerConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(
            model.d_model, eps=model.norm_eps, offset=model.norm_offset, param_dtype=model.param_dtype, rngs=rngs
        )
        build: Any = mixer.mixer()
        self.mixer = build(mixer, **dataclasses.asdict(model.setting), rngs=rngs)

    def __call__(self, given: BlockInput, state: Any = None) -> BlockOutput:
        """The residual stream after the block, and what it carries on."""
        output = self.mixer.run_block(given, self.norm, state)
        return dataclasses.replace(output, residual=constrain(output.residual, Axis.BATCH, Axis.LENGTH, None))
