"""A mixer that the library does not know: an exponential moving average of every channel, at a rate that it learns."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.models import initializers, layers
from mamba_jax.models.mixers.declaration import MIXERS, MixerConfig, Setting, StateArray
from mamba_jax.models.mixers.mixer import Mixer, MixerOutput
from mamba_jax.sharding import Axis


@MIXERS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig(MixerConfig):
    """Attributes: `kind`, and `rate`, the initial logit of the decay."""

    kind: Literal["ema"] = "ema"
    rate: float = 1.0

    @classmethod
    def mixer(cls) -> type[Mixer]:
        return Ema


class Ema(Mixer):
    """h_t = a h_{t-1} + (1 - a) u_t with a = sigmoid(rate), and y = out_proj(h)."""

    def __init__(self, config: EmaConfig, *, rngs: nnx.Rngs, **setting: Any) -> None:
        super().__init__(config, **setting)
        width, rate = self.setting.d_model, initializers.constant(config.rate)
        self.rate = layers.parameter(rngs, rate, (width,), (Axis.EMBED,), dtype=self.setting.param_dtype, decay=False)
        scale = self.setting.output_scale
        self.out_proj = layers.projection(
            self.setting, (width, width), (Axis.EMBED, Axis.INNER), scale=scale, rngs=rngs
        )

    @classmethod
    def declare_state(cls, config: EmaConfig, setting: Setting, *, batch_size: int, max_length: int | None) -> Any:
        return StateArray(shape=(batch_size, setting.d_model), dtype="float32", axes=(Axis.BATCH, None))

    def advance(self, u_BLD: Any, state: Any = None, segment_ids_BL: Any = None) -> MixerOutput:
        u = self.checked_input(u_BLD).astype(jnp.float32)
        decay = jnp.broadcast_to(jax.nn.sigmoid(layers.read(self.rate))[None, None], u.shape)
        inputs = (1 - decay) * u
        if segment_ids_BL is not None:
            is_start = jnp.pad(segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1], ((0, 0), (1, 0)))
            decay = jnp.where(is_start[:, :, None], 0, decay)
        if state is not None:
            inputs = inputs.at[:, 0].add(decay[:, 0] * state)
        _, h = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, inputs), axis=1)
        return MixerOutput(y=self.out_proj(h), state=h[:, -1])
