"""The Mamba-2 mixer: heads with one decay each, a short convolution, and a gated norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.models import initializers, layers, ops
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.convolution import CausalConv1d
from mamba_jax.models.layers import parameter, read
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.mixers.mamba2.config import Mamba2Config
from mamba_jax.models.mixers.mamba2.gated_norm import GatedRMSNorm
from mamba_jax.models.mixers.mamba2.learned_start import from_learned_state
from mamba_jax.models.mixers.mamba2.state import LEARNED, Mamba2State, declare, empty_ring
from mamba_jax.models.mixers.mamba2.whole_step import step_whole
from mamba_jax.models.mixers.mixer import BlockInput, BlockOutput, Mixer, MixerOutput
from mamba_jax.sharding import Axis, in_groups
from pallas_kernels import SSDArguments, as_decaying_attention, mamba2_settled_state
from pallas_kernels.common.array_types import Size


class Mamba2(Mixer):
    r"""The mixer of Mamba-2, a layer for any model.

        z, x     = in_proj(u);   B, C = BC_proj(u);   dt = dt_proj(u)
        x, B, C  = silu(conv1d(x, B, C))
        h_t      = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      with dt_t = softplus(dt_t + bias), for every head
        y_t      = h_t C_t + D x_t
        output   = out_proj(norm(y silu(z)))

    What the authors have as one input projection, and one convolution, is cut here where heads may be split over
    devices. Channels that the config's `ssm_dim` leaves go through silu(gate) value instead, and to `out_proj` first.

    Example:
        mixer = Mamba2(d_model=64, rngs=nnx.Rngs(0))
        residual = residual + mixer(norm(residual))

    Source: arXiv 2405.21060, section 7.1 and figure 6.
    """

    config: Mamba2Config

    def __init__(self, config: Mamba2Config | ModelConfig | None = None, *, rngs: nnx.Rngs, **setting: Any) -> None:
        """Draws the parameters.

        Args:
            config: as in `Mixer`; None takes the defaults.
            rngs: source of keys.
            **setting: as in `Mixer`: `d_model`, `param_dtype`, `compute_dtype`, `output_scale`.

        Raises:
            InputError: as in `Mixer`, or the width does not divide into heads, groups and groups of the norm.
        """
        super().__init__(config or Mamba2Config(), **setting)
        config, width = self.config, self.setting.d_model
        channels, gated = config.channels(width), config.gated_channels(width)

        def projection(shape: tuple[int, ...], axes: tuple[Axis | None, ...], *, scale: float = 1.0) -> layers.Linear:
            return layers.projection(self.setting, shape, axes, use_bias=config.use_bias, scale=scale, rngs=rngs)

        self.in_proj = projection((width, 2, channels), (Axis.EMBED, None, Axis.INNER))
        self.BC_proj = projection((width, 2, config.num_groups, config.state_dim), (Axis.EMBED, None, None, None))
        self.dt_proj = projection((width, config.heads(width)), (Axis.EMBED, Axis.HEADS))
        if gated:
            self.mlp_proj = projection((width, 2, gated), (Axis.EMBED, None, Axis.INNER))
        self.conv1d = self._convolution(channels, rngs=rngs)
        self.BC_conv1d = self._convolution(2 * config.num_groups * config.state_dim, rngs=rngs)
        self._init_dynamics(config.heads(width), rngs=rngs)
        if config.use_norm:
            self.norm = GatedRMSNorm(
                channels,
                group_size=config.group_size(width),
                eps=config.norm_eps,
                is_before_gate=config.norm_before_gate,
                param_dtype=self.setting.param_dtype,
                rngs=rngs,
            )
        axes, scale = (Axis.INNER, Axis.EMBED), self.setting.output_scale
        self.out_proj = projection((gated + channels, width), axes, scale=scale)

    def _convolution(self, channels: int, *, rngs: nnx.Rngs) -> CausalConv1d:
        """A short causal convolution as configured; the mixer has one for x and another for B and C."""
        config = self.config
        return CausalConv1d(
            channels,
            width=config.conv_width,
            use_bias=config.use_conv_bias,
            weight_init=None if config.conv_init is None else initializers.uniform(config.conv_init),
            param_dtype=self.setting.param_dtype,
            rngs=rngs,
        )

    def _init_dynamics(self, heads: int, *, rngs: nnx.Rngs) -> None:
        """Creates the bias of dt, A_log and D of every head, and the initial state if it is learned."""
        config, axes = self.config, (Axis.HEADS,)

        # None of them is pulled to zero by weight decay.
        def own(init: initializers.Initializer, shape: tuple[int, ...], axes: tuple[Axis | None, ...]) -> nnx.Param:
            return parameter(rngs, init, shape, axes, dtype=self.setting.param_dtype, decay=False)

        step = initializers.inverse_softplus_of_step(config.dt_min, config.dt_max, config.dt_init_floor)
        self.dt_bias = own(step, (heads,), axes)
        self.A_log = own(initializers.log_of_uniform(*config.a_init_range), (heads,), axes)
        if config.skip == "channel":
            self.D = own(initializers.ones, (heads, config.head_dim), (*axes, None))
        else:
            self.D = own(initializers.ones, (heads,), axes)
        if config.learn_initial_state:
            shape = (heads, config.head_dim, config.state_dim)
            self.initial_state = own(initializers.zeros, shape, (*axes, None, Axis.STATE))

    @classmethod
    def declare_state(
        cls, config: Mamba2Config, setting: Setting, *, batch_size: int, max_length: int | None
    ) -> Mamba2State:
        """See `Mixer.declare_state`."""
        del max_length
        return declare(config, setting, batch_size=batch_size)

    @classmethod
    def flops_per_token(cls, config: Mamba2Config, setting: Setting, *, length: int) -> float:
        """15 for an element of the state: 5 in the forward pass, and twice as many backwards.

        The 5 are those of the recurrence: decay, product of x and B, their sum, product with C, and its sum. What a
        chunk of matrix products computes besides is not counted, as it depends on the backend.

        Source: arXiv 2405.21060, equation 1.
        """
        return 15.0 * config.channels(setting.d_model) * config.state_dim

    @classmethod
    def least_part(cls, config: Mamba2Config) -> int:
        """As many tokens as the convolution reaches back, for they all come from the device before."""
        return max(config.past, 1)

    def run_block(self, given: BlockInput, norm: Any, state: Any) -> BlockOutput:
        """See `Mixer.run_block`; a single token of a text that grows may be one operation."""
        return step_whole(self, given, norm, state) or super().run_block(given, norm, state)

    def advance(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: Mamba2State | None = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> MixerOutput:
        """See `Mixer.advance`."""
        segment_ids = None if segment_ids_BL is None else jnp.asarray(segment_ids_BL)
        u_BLD = self.checked_input(u_BLD)
        z_BLE, x_BLE = (ops.constrain(part, "BLE") for part in self.in_proj.parts(u_BLD))
        x = self.conv1d(x_BLE, None if state is None else state.conv_window, segment_ids)
        BC_BL2GN = self.BC_proj(u_BLD)
        BC_BLM = BC_BL2GN.reshape(*BC_BL2GN.shape[:2], -1)
        BC = self.BC_conv1d(BC_BLM, None if state is None else state.BC_window, segment_ids)
        y_BLE, ssm_BHPN = self._recur(u_BLD, x.y, BC.y.reshape(BC_BL2GN.shape), state, segment_ids)
        y_BLE = self.norm(y_BLE, z_BLE) if self.config.use_norm else y_BLE * jax.nn.silu(z_BLE)
        if self.config.gated_channels(self.setting.d_model):
            gate_BLF, value_BLF = self.mlp_proj.parts(u_BLD)
            gated_BLF = jax.nn.silu(gate_BLF) * value_BLF
            y_BLE = jnp.concatenate([gated_BLF, y_BLE], axis=-1)
        dtype = self.setting.compute_dtype
        after = Mamba2State(
            conv_window=x.final_window.astype(dtype),
            BC_window=BC.final_window.astype(dtype),
            ssm=ssm_BHPN,
            ring=empty_ring(self.config, self.setting, batch_size=u_BLD.shape[0]),
        )
        return MixerOutput(y=self.out_proj(ops.constrain(y_BLE, "BLE")), state=after)

    def _recur(
        self,
        u_BLD: jax.Array,
        x_BLE: jax.Array,
        BC_BL2GN: jax.Array,
        state: Mamba2State | None,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """The recurrence: output (B, L, E), and state (B, H, P, N) after the last token."""
        x_BLHP = in_groups(x_BLE, self.config.head_dim)
        tokens: dict[str, Any] = {
            "x": ops.constrain(x_BLHP, "BLHP"),
            "dt": ops.constrain(self.dt_proj(u_BLD), "BLH"),
            "B": BC_BL2GN[:, :, 0],
            "C": BC_BL2GN[:, :, 1],
        }
        dynamics: dict[str, Any] = {
            "A": -jnp.exp(read(self.A_log).astype(jnp.float32)),
            "D": read(self.D),
            "dt_bias": read(self.dt_bias),
            "dt_softplus": True,
            "dt_limit": self.config.dt_limit,
        }
        before = self._state_before(state, x_BLE.shape[0])
        if state is not None and x_BLE.shape[1] == 1:
            token: dict[str, Any] = {name: array[:, 0] for name, array in tokens.items()}
            step = ops.ssd_state_update(state=before, **token, **dynamics)
            return step.y.reshape(x_BLE.shape), step.state
        output = ops.ssd(
            **tokens,
            **dynamics,
            initial_state=before,
            segment_ids=segment_ids,
            past=self.config.past,
            implementation=self.config.ssd_implementation,
        )
        y_BLHP, after = output.y, output.final_state
        if segment_ids is not None and self.config.learn_initial_state:
            core = as_decaying_attention(SSDArguments.of(**tokens, **dynamics, segment_ids=segment_ids))
            y_more, state_more = from_learned_state(core, read(self.initial_state))
            y_BLHP, after = y_BLHP + y_more.astype(y_BLHP.dtype), after + state_more
        return y_BLHP.reshape(x_BLE.shape), after

    def _state_before(self, state: Mamba2State | None, batch: Size) -> jax.Array | None:
        """The recurrent state before the first token; None is zero."""
        before = None if state is None else state.ssm
        if state is not None and state.ring is not None:
            before = mamba2_settled_state(
                state.ssm,
                state.ring.named(),
                A_log_H=read(self.A_log),
                dt_bias_H=read(self.dt_bias),
                dt_limit=self.config.dt_limit,
            )
        if not self.config.learn_initial_state:
            return before
        learned = read(self.initial_state).astype(jnp.float32)[None]
        learned = jnp.broadcast_to(learned, (batch, *learned.shape[1:]))
        return learned if before is None else jnp.where(before == LEARNED, learned, before)
