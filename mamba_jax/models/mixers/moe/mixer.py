"""The mixture of experts as a mixer that carries no state."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Float

from mamba_jax.models import layers
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.mixers.mixer import MixerOutput, TokenMixer
from mamba_jax.models.mixers.moe.config import MoeConfig
from mamba_jax.models.mixers.moe.experts import Experts
from mamba_jax.models.mixers.moe.routing import route
from mamba_jax.sharding import Axis


class Moe(TokenMixer):
    r"""A mixture of experts: a router sends every token through K of X perceptrons.

        experts, weights = route(router(u))
        output           = sum_k weights_k expert_k(u)

    Every expert is gate_e, up_e = up_proj_e(u); expert_e(u) = down_proj_e(act(gate_e) * up_e). No token is dropped,
    however many go to one expert. The router is float32.

    Source: arXiv 2101.03961, section 2; without dropped tokens, arXiv 2211.15841; in Jamba, arXiv 2403.19887.
    """

    config: MoeConfig

    def __init__(self, config: MoeConfig | ModelConfig | None = None, *, rngs: nnx.Rngs, **setting: Any) -> None:
        """Draws the parameters; arguments and errors as in `Mixer`, of which `rngs` is the source of keys."""
        super().__init__(config or MoeConfig(), **setting)
        in_float32 = dataclasses.replace(self.setting, compute_dtype="float32")
        shape = (self.setting.d_model, self.config.num_experts)
        self.router = layers.projection(in_float32, shape, (Axis.EMBED, None), rngs=rngs)
        # Weights that are rounded to 8 bits would send tokens to other experts.
        self.router.kernel.set_metadata(summed=None)
        self.experts = Experts(self.config, self.setting, rngs=rngs)

    @classmethod
    def idle_parameters(cls, config: MoeConfig, setting: Setting) -> int:
        """Those of the experts that a token is not sent to."""
        expert = (config.halves + 1) * setting.d_model * config.channels(setting.d_model)
        return (config.num_experts - config.experts_per_token) * expert

    def on_tokens(self, u_BLD: Float[jax.Array, "B L D"]) -> MixerOutput:
        """See `TokenMixer.on_tokens`; the penalty alone depends on which tokens are together."""
        # A choice between experts leaps where two are equally probable: products of fewer bits would move that place.
        with jax.default_matmul_precision("highest"):
            logits_BLX = self.router(u_BLD)
        routing = route(self.config, logits_BLX)
        return MixerOutput(y=self.experts(u_BLD, routing), state=(), penalty=routing.penalty)
