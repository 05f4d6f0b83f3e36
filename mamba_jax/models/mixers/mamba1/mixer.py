"""The Mamba-1 mixer: gated selective state space layer with a short convolution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from mamba_jax.models import initializers, layers, ops
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.convolution import CausalConv1d
from mamba_jax.models.layers import parameter, read
from mamba_jax.models.mixers.declaration import Setting
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.models.mixers.mamba1.dt_projection import DtProjection
from mamba_jax.models.mixers.mamba1.state import Mamba1State, declare
from mamba_jax.models.mixers.mamba1.whole_step import step_whole
from mamba_jax.models.mixers.mixer import BlockInput, BlockOutput, Mixer, MixerOutput
from mamba_jax.sharding import Axis


class Mamba1(Mixer):
    r"""The selective state space mixer, a layer for any model.

        x, z     = in_proj(u)
        x        = silu(conv1d(x))
        dt, B, C = x_proj(x);  dt = dt_proj(dt)
        h_t      = exp(softplus(dt_t + bias) A) h_{t-1} + softplus(dt_t + bias) B_t x_t
        y_t      = (C_t h_t + D x_t) silu(z_t)
        output   = out_proj(y)

    Those of dt, B and C that the config's `selective` does not name are learned constants.

    Example:
        class Model(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.embed = nnx.Embed(256, 64, rngs=rngs)
                self.norm = nnx.RMSNorm(64, rngs=rngs)
                self.mixer = Mamba1(d_model=64, rngs=rngs)
                self.head = nnx.Linear(64, 256, rngs=rngs)

            def __call__(self, tokens):
                x = self.embed(tokens)
                return self.head(x + self.mixer(self.norm(x)))

        logits = Model(nnx.Rngs(0))(tokens)

    Source: arXiv 2312.00752, algorithm 2, figure 3 and section 3.4.
    """

    config: Mamba1Config

    def __init__(
        self,
        config: Mamba1Config | ModelConfig | None = None,
        *,
        d_model: int | None = None,
        param_dtype: DTypeLike = "float32",
        compute_dtype: DTypeLike = "float32",
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters; arguments as in `Mixer`, of which `rngs` is the source of keys."""
        super().__init__(
            config or Mamba1Config(),
            d_model=d_model,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            output_scale=output_scale,
        )
        config, width = self.config, self.setting.d_model
        inner = config.channels(width)
        halves = 2 if config.use_gate else 1
        projection = functools.partial(layers.projection, self.setting, rngs=rngs)
        axes = (Axis.EMBED, None, Axis.INNER)
        self.in_proj = projection((width, halves, inner), axes, use_bias=config.use_bias)
        if config.use_conv:
            self.conv1d = CausalConv1d(
                inner,
                width=config.conv_width,
                use_bias=config.use_conv_bias,
                param_dtype=self.setting.param_dtype,
                rngs=rngs,
            )
        self._init_selection(inner, config.rank(width), rngs=rngs)
        self._init_dynamics((inner, config.state_dim), rngs=rngs)
        scale = self.setting.output_scale
        self.out_proj = projection((inner, width), (Axis.INNER, Axis.EMBED), use_bias=config.use_bias, scale=scale)

    def _init_selection(self, inner: int, rank: int, *, rngs: nnx.Rngs) -> None:
        """What makes dt, B and C of the input; a constant B or C is among the dynamics."""
        config = self.config
        dims = {"dt": rank, "B": config.state_dim, "C": config.state_dim}
        self.split_dims = tuple(dim for name, dim in dims.items() if name in config.selective)
        if self.split_dims:
            shape = (inner, sum(self.split_dims))
            self.x_proj = layers.projection(self.setting, shape, (Axis.INNER, None), rngs=rngs)
        bound = rank**-0.5 * config.dt_scale
        self.dt_proj = DtProjection(
            rank if "dt" in config.selective else None,
            inner,
            kernel_init=initializers.uniform(bound) if config.dt_init == "random" else initializers.constant(bound),
            bias_init=initializers.inverse_softplus_of_step(config.dt_min, config.dt_max, config.dt_init_floor),
            param_dtype=self.setting.param_dtype,
            compute_dtype=self.setting.compute_dtype,
            rngs=rngs,
        )
        if config.selection_norm_weights:
            dtype = self.setting.param_dtype
            for name in config.selective:
                scale = parameter(rngs, initializers.ones, (dims[name],), (None,), dtype=dtype, decay=False)
                setattr(self, f"{name}_scale", scale)

    def _init_dynamics(self, shape: tuple[int, int], *, rngs: nnx.Rngs) -> None:
        """Creates A_log (E, N), D (E,), and B and C where they do not depend on the input; `shape` is (E, N)."""
        axes, dtype = (Axis.INNER, Axis.STATE), self.setting.param_dtype
        log_decay = initializers.log_decay(self.config.a_init)
        self.A_log = parameter(rngs, log_decay, shape, axes, dtype=dtype, decay=False)
        self.D = parameter(rngs, initializers.ones, shape[:1], axes[:1], dtype=dtype, decay=False)
        if "B" not in self.config.selective:
            self.B = parameter(rngs, initializers.ones, shape, axes, dtype=dtype, decay=False)
        if "C" not in self.config.selective:
            self.C = parameter(rngs, initializers.normal(1.0), shape, axes, dtype=dtype, decay=False)

    @classmethod
    def declare_state(
        cls, config: Mamba1Config, setting: Setting, *, batch_size: int, max_length: int | None
    ) -> Mamba1State:
        """See `Mixer.declare_state`."""
        del max_length
        return declare(config, setting, batch_size=batch_size)

    @classmethod
    def flops_per_token(cls, config: Mamba1Config, setting: Setting, *, length: int) -> float:
        """27 for an element of the state: 9 in the forward pass, as the authors count, and twice as many backwards.

        Source: issue 110 of the authors' repository.
        """
        return 27.0 * config.channels(setting.d_model) * config.state_dim

    @classmethod
    def least_part(cls, config: Mamba1Config) -> int:
        """As many tokens as the convolution reaches back, for they all come from the device before."""
        return max(config.past, 1)

    def run_block(self, given: BlockInput, norm: Any, state: Any) -> BlockOutput:
        """See `Mixer.run_block`; a single token of a text that grows may be one operation."""
        return step_whole(self, given, norm, state) or super().run_block(given, norm, state)

    def advance(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: Mamba1State | None = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> MixerOutput:
        """See `Mixer.advance`."""
        segment_ids = None if segment_ids_BL is None else jnp.asarray(segment_ids_BL)
        x_BLE, *gate = (ops.constrain(part, "BLE") for part in self.in_proj.parts(self.checked_input(u_BLD)))
        z_BLE = gate[0] if gate else None
        if self.config.use_conv:
            convolved = self.conv1d(x_BLE, None if state is None else state.conv_window, segment_ids)
            x_BLE, window_BWE = convolved.y, convolved.final_window
        else:
            x_BLE, window_BWE = jax.nn.silu(x_BLE), x_BLE[:, :0]
        scan = {"x": x_BLE, "z": z_BLE, **self._selection(x_BLE), **self._dynamics()}
        if state is not None and x_BLE.shape[1] == 1:
            y_BLE, ssm_BEN = self._step(state.ssm, **scan)
        else:
            output = ops.selective_scan(
                **scan,
                initial_state=None if state is None else state.ssm,
                segment_ids=segment_ids,
                past=self.config.past,
                implementation=self.config.scan_implementation,
            )
            y_BLE, ssm_BEN = output.y, output.final_state
        y_BLD = self.out_proj(ops.constrain(y_BLE, "BLE"))
        window_BWE = window_BWE.astype(self.setting.compute_dtype)
        return MixerOutput(y=y_BLD, state=Mamba1State(conv_window=window_BWE, ssm=ssm_BEN))

    def _step(self, ssm_BEN: jax.Array, **scan: Any) -> tuple[jax.Array, jax.Array]:
        """The scan of a single token that continues a state."""
        # B and C that change with the token are (B, 1, N) already: one group for all channels.
        token: dict[str, Any] = {name: None if scan[name] is None else scan[name][:, 0] for name in ("x", "dt", "z")}
        output = ops.selective_state_update(state=ssm_BEN, **scan | token)
        return output.y[:, None], output.state

    def _selection(self, x_BLE: jax.Array) -> dict[str, Any]:
        """Step size (B, L, E) before bias and softplus; B and C, (B, L, N) if selective and else (E, N)."""
        chosen = [name for name in ("dt", "B", "C") if name in self.config.selective]
        offsets = np.cumsum(self.split_dims)[:-1].tolist()
        parts = dict(zip(chosen, jnp.split(self.x_proj(x_BLE), offsets, axis=-1), strict=True)) if chosen else {}
        if (eps := self.config.selection_norm_eps) is not None:
            parts = {name: self._normalized(name, part, eps=eps) for name, part in parts.items()}
        dt_BLE = self.dt_proj(parts["dt"]) if "dt" in parts else jnp.zeros_like(x_BLE)
        matrices = {name: parts[name] if name in parts else read(getattr(self, name)) for name in ("B", "C")}
        return {"dt": ops.constrain(dt_BLE, "BLE"), "dt_bias": read(self.dt_proj.bias), "dt_softplus": True, **matrices}

    def _normalized(self, name: str, part: jax.Array, *, eps: float) -> jax.Array:
        """B, C or what dt is projected from, after its norm."""
        normed = layers.rms_normalized(part, eps=eps)
        if self.config.selection_norm_weights:
            normed *= read(getattr(self, f"{name}_scale")).astype(jnp.float32)[None, None]
        return normed.astype(part.dtype)

    def _dynamics(self) -> dict[str, Any]:
        A_EN = -jnp.exp(read(self.A_log).astype(jnp.float32))
        return {"A": A_EN, "D": read(self.D), "discretization": self.config.discretization}
