"""The multilayer perceptron as a mixer that carries no state."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Float

from mamba_jax.models import layers, ops
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.mixer import MixerOutput, TokenMixer
from mamba_jax.models.mixers.mlp.config import MlpConfig
from mamba_jax.sharding import Axis


class Mlp(TokenMixer):
    r"""The multilayer perceptron, on every token alone.

        gate, up = up_proj(u)
        output   = down_proj(act(gate) * up)

    Without a gate, up_proj(u) is up alone and output = down_proj(act(up)). The weights of gate and up are one array
    (D, 2, E), so that splitting E over devices keeps the two halves of a channel together.

    Source: arXiv 1706.03762, section 3.3; gated, arXiv 2002.05202, section 2.
    """

    config: MlpConfig

    def __init__(self, config: MlpConfig | ModelConfig | None = None, *, rngs: nnx.Rngs, **setting: Any) -> None:
        """Draws the parameters; arguments and errors as in `Mixer`, of which `rngs` is the source of keys."""
        super().__init__(config or MlpConfig(), **setting)
        config, width = self.config, self.setting.d_model
        inner, use_bias = config.channels(width), config.use_bias
        axes = (Axis.EMBED, None, Axis.INNER)
        self.up_proj = layers.projection(
            self.setting, (width, config.halves, inner), axes, use_bias=use_bias, rngs=rngs
        )
        self.down_proj = layers.projection(
            self.setting,
            (inner, width),
            (Axis.INNER, Axis.EMBED),
            use_bias=use_bias,
            scale=self.setting.output_scale,
            rngs=rngs,
        )

    def on_tokens(self, u_BLD: Float[jax.Array, "B L D"]) -> MixerOutput:
        """See `TokenMixer.on_tokens`."""
        return MixerOutput(y=self.from_projected(self.up_proj(u_BLD)), state=())

    def from_projected(self, projected_BLPE: Float[jax.Array, "B L P E"]) -> Float[jax.Array, "B L D"]:
        """The output from that of `up_proj`, to which a caller may have added something."""
        return self.down_proj(ops.constrain(self.config.activated(projected_BLPE), "BLE"))
