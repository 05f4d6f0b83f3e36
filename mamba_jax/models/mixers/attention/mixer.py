"""The attention mixer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import layers
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.convolution import CausalConv1d
from mamba_jax.models.mixers.attention import cache
from mamba_jax.models.mixers.attention.attend import AttendOptions
from mamba_jax.models.mixers.attention.cache import AttentionState
from mamba_jax.models.mixers.attention.config import AttentionConfig
from mamba_jax.models.mixers.attention.heads import attend_and_keep
from mamba_jax.models.mixers.attention.rotary import positions_in_documents, rotate
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.mixers.mixer import Mixer, MixerOutput
from mamba_jax.sharding import Axis, constrain


class Attention(Mixer):
    r"""Causal attention with the options of `AttentionConfig`, a layer for any model.

        q, k, v = q_proj(u), k_proj(u), v_proj(u);   q, k, v = conv(q), conv(k), conv(v)
        q, k    = rotate(q, position), rotate(k, position)
        y_i     = sum_j softmax_j(scale q_i . k_j) v_j      over j <= i in the same document and window, for every head
        output  = out_proj(y)

    Its state holds keys and values. It has room for a number of tokens, see `declare_state` and
    `mamba_jax.models.state.with_room`; tokens that would have to attend to more than it holds come out as NaN.

    Example:
        mixer = Attention(AttentionConfig(num_heads=4), d_model=64, rngs=nnx.Rngs(0))
        residual = residual + mixer(norm(residual))

    Source: arXiv 1706.03762, section 3.2.2.
    """

    config: AttentionConfig

    def __init__(self, config: AttentionConfig | ModelConfig, *, rngs: nnx.Rngs, **setting: Any) -> None:
        """Draws the parameters.

        Args:
            config: as in `Mixer`.
            rngs: source of keys.
            **setting: as in `Mixer`: `d_model`, `param_dtype`, `compute_dtype`, `output_scale`.

        Raises:
            InputError: as in `Mixer`, or the width does not divide into heads, or more of a head is to be rotated than
                there is.
        """
        super().__init__(config, **setting)
        config, width = self.config, self.setting.d_model
        channels, given = config.channels(width), config.input_dim or width
        self.rotary_dims = config.rotated_channels(width)

        def projection(heads: int, axis: Axis) -> layers.Linear:
            shape, axes = (given, heads, channels), (Axis.EMBED, axis, None)
            return layers.projection(self.setting, shape, axes, use_bias=config.use_qkv_bias, rngs=rngs)

        self.q_proj = projection(config.num_heads, Axis.HEADS)
        self.k_proj = projection(config.kv_heads, Axis.KV_HEADS)
        self.v_proj = projection(config.kv_heads, Axis.KV_HEADS)
        if config.conv_width is not None:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                CausalConv1d(
                    heads * channels,
                    width=config.conv_width,
                    use_bias=config.use_conv_bias,
                    param_dtype=self.setting.param_dtype,
                    rngs=rngs,
                )
                for heads in (config.num_heads, config.kv_heads, config.kv_heads)
            )
        self.out_proj = layers.projection(
            self.setting,
            (config.num_heads * channels, width),
            (Axis.INNER, Axis.EMBED),
            use_bias=config.use_output_bias,
            scale=self.setting.output_scale,
            rngs=rngs,
        )

    @classmethod
    def declare_state(
        cls, config: AttentionConfig, setting: Setting, *, batch_size: int, max_length: int | None
    ) -> AttentionState:
        """See `Mixer.declare_state`."""
        return cache.declare(config, setting, batch_size=batch_size, max_length=max_length)

    @classmethod
    def grow_state(cls, config: AttentionConfig, state: AttentionState, max_length: int) -> AttentionState:
        """See `Mixer.grow_state`."""
        return cache.grown(state, config.capacity(max_length))

    @classmethod
    def flops_per_token(cls, config: AttentionConfig, setting: Setting, *, length: int) -> float:
        """12 H P times the tokens of a sequence, or of the window if this is shorter.

        That is 2 for each product and sum, of two products with all of the sequence, and twice as much backwards; what
        the causal mask saves is not subtracted, as in the count that the Mamba papers compare with.

        Source: the formula of the authors, 12 x layers x hidden x context x tokens, as in arXiv 2204.02311, appendix B.
        """
        context = min(length, config.window or length)
        return 12.0 * config.num_heads * config.channels(setting.d_model) * context

    @classmethod
    def least_part(cls, config: AttentionConfig) -> int:
        """As many tokens as the convolution reaches back."""
        return max(config.past, 1)

    def advance(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: AttentionState | None = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> MixerOutput:
        """See `Mixer.advance`."""
        segment_ids = None if segment_ids_BL is None else jnp.asarray(segment_ids_BL)
        u_BLD = self.checked_input(u_BLD, width=self.config.input_dim)
        batch, length, _ = u_BLD.shape
        position = None if state is None else state.position
        positions = positions_in_documents(length, segment_ids, position)
        q, k, v, windows = self._queries_keys_values(u_BLD, state, segment_ids)
        turn = {"dims": self.rotary_dims, "theta": self.config.rope_theta}
        options = AttendOptions(
            scale=self.config.scale(self.setting.d_model),
            window=self.config.window,
            implementation=self.config.attention_implementation,
        )
        is_plain = state is None and segment_ids is None
        mixed = attend_and_keep(
            options,
            q=constrain(rotate(q, positions, **turn), Axis.BATCH, Axis.LENGTH, Axis.HEADS, None),
            k=constrain(rotate(k, positions, **turn), Axis.BATCH, Axis.LENGTH, Axis.KV_HEADS, None),
            v=constrain(v, Axis.BATCH, Axis.LENGTH, Axis.KV_HEADS, None),
            positions=None if is_plain else positions,
            state=state,
        )
        slot = jnp.zeros(batch, jnp.int32) if state is None else state.slot
        after = AttentionState(
            keys=mixed.keys,
            values=mixed.values,
            slot=(slot + length) % mixed.keys.shape[1],
            position=jnp.broadcast_to(positions[:, -1] + 1, (batch,)),
            windows=windows,
        )
        return MixerOutput(y=self.out_proj(mixed.y.reshape(batch, length, -1)), state=after)

    def _queries_keys_values(
        self, u_BLD: jax.Array, state: AttentionState | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
        """Queries (B, L, H, P), keys and values (B, L, K, P) before the rotation, and the windows of convolutions."""
        heads = {"q": self.q_proj(u_BLD), "k": self.k_proj(u_BLD), "v": self.v_proj(u_BLD)}
        windows = {}
        if self.config.conv_width is not None:
            convolutions = {"q": self.q_conv1d, "k": self.k_conv1d, "v": self.v_conv1d}
            for name, convolution in convolutions.items():
                window = None if state is None else state.windows[name]
                joined_BLE = heads[name].reshape(*u_BLD.shape[:2], -1)
                output = convolution(joined_BLE, window, segment_ids, activation=None)
                heads[name] = output.y.reshape(heads[name].shape)
                windows[name] = output.final_window.astype(self.setting.compute_dtype)
        return heads["q"], heads["k"], heads["v"], windows
