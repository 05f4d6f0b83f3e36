"""The recurrent block of Griffin: a short convolution and a gated linear recurrence, times a second branch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import initializers, layers, ops
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.convolution import CausalConv1d
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.mixers.mixer import Mixer, MixerOutput
from mamba_jax.models.mixers.rg_lru.config import RGLRUConfig
from mamba_jax.models.mixers.rg_lru.recurrence import RealGatedLRU
from mamba_jax.models.mixers.rg_lru.state import RGLRUState, declare
from mamba_jax.sharding import Axis


class RGLRU(Mixer):
    r"""The recurrent block of Griffin and Hawk, a layer for any model.

        y, x   = in_proj(u)
        x      = conv1d(x)
        h      = rg_lru(x)
        output = out_proj(h gelu(y))

    `rg_lru` is the real-gated linear recurrent unit of `recurrence.py`, gelu its approximation by a tanh. Projections
    and the convolution have biases, which begin at zero. Weights of projections begin normal with variance 1 / inputs
    (those of `out_proj` times `output_scale` squared), those of the convolution with variance 0.01 / K, Lambda such
    that exp(-8 softplus(Lambda)) is uniform in the config's `decay_range`.

    Example:
        mixer = RGLRU(RGLRUConfig(num_heads=4), d_model=64, rngs=nnx.Rngs(0))
        residual = residual + mixer(norm(residual))

    Source: arXiv 2402.19427, sections 2.3 and 2.4 and figure 2. There the range is that of the decay at an open gate,
    as here; the published code gives it to the eighth root of that.
    """

    config: RGLRUConfig

    def __init__(self, config: RGLRUConfig | ModelConfig | None = None, *, rngs: nnx.Rngs, **setting: Any) -> None:
        """Draws the parameters; arguments as in `Mixer`, of which `rngs` is the source of keys.

        Raises:
            InputError: as in `Mixer`, or the heads do not divide the channels.
        """
        super().__init__(config or RGLRUConfig(), **setting)
        config, width = self.config, self.setting.d_model
        channels = config.channels(width)
        self.in_proj = self._projection((width, 2, channels), (Axis.EMBED, None, Axis.INNER), rngs=rngs)
        self.conv1d = CausalConv1d(
            channels,
            width=config.conv_width,
            weight_init=initializers.normal(0.1 * config.conv_width**-0.5),
            bias_init=initializers.zeros,
            param_dtype=self.setting.param_dtype,
            rngs=rngs,
        )
        self.rg_lru = RealGatedLRU(
            channels,
            heads=config.num_heads,
            decay_range=config.decay_range,
            param_dtype=self.setting.param_dtype,
            rngs=rngs,
        )
        scale = self.setting.output_scale
        self.out_proj = self._projection((channels, width), (Axis.INNER, Axis.EMBED), scale=scale, rngs=rngs)

    def _projection(
        self, shape: tuple[int, ...], axes: tuple[Axis | None, ...], *, scale: float = 1.0, rngs: nnx.Rngs
    ) -> layers.Linear:
        """A projection as the block begins with it."""
        return layers.Linear(
            shape,
            axes,
            kernel_init=initializers.normal(scale * shape[0] ** -0.5),
            bias_init=initializers.zeros,
            param_dtype=self.setting.param_dtype,
            compute_dtype=self.setting.compute_dtype,
            rngs=rngs,
        )

    @classmethod
    def declare_state(
        cls, config: RGLRUConfig, setting: Setting, *, batch_size: int, max_length: int | None
    ) -> RGLRUState:
        """See `Mixer.declare_state`."""
        del max_length
        return declare(config, setting, batch_size=batch_size)

    @classmethod
    def flops_per_token(cls, config: RGLRUConfig, setting: Setting, *, length: int) -> float:
        """12 for a channel: 4 in the forward pass, and twice as many backwards.

        The 4 are those of the recurrence: the products with i, with sqrt(1 - a^2) and of decay and state, and the sum.

        Source: arXiv 2402.19427, equation 4.
        """
        return 12.0 * config.channels(setting.d_model)

    @classmethod
    def least_part(cls, config: RGLRUConfig) -> int:
        """As many tokens as the convolution reaches back, for they all come from the device before."""
        return max(config.past, 1)

    def advance(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: RGLRUState | None = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> MixerOutput:
        """See `Mixer.advance`."""
        segment_ids = None if segment_ids_BL is None else jnp.asarray(segment_ids_BL)
        yx_BL2E = self.in_proj(self.checked_input(u_BLD))
        y_BLE, x_BLE = (ops.constrain(yx_BL2E[:, :, index], "BLE") for index in range(2))
        convolved = self.conv1d(x_BLE, None if state is None else state.conv_window, segment_ids, activation=None)
        recurred = self.rg_lru(
            convolved.y,
            None if state is None else state.hidden,
            segment_ids,
            past=self.config.past,
            implementation=self.config.scan_implementation,
        )
        gated_BLE = recurred.hidden.astype(y_BLE.dtype) * jax.nn.gelu(y_BLE, approximate=True)
        after = RGLRUState(conv_window=convolved.final_window.astype(self.setting.compute_dtype), hidden=recurred.final)
        return MixerOutput(y=self.out_proj(ops.constrain(gated_BLE, "BLE")), state=after)
