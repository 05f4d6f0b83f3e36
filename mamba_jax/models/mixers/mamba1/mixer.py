"""The Mamba-1 mixer: gated selective state space layer with a short convolution."""

import functools
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from mamba_jax.errors import InputError
from mamba_jax.models import initializers, sequence_parallel
from mamba_jax.models.config import DType, ModelConfig
from mamba_jax.models.convolution import SEQUENCE, WHOLE_SEQUENCE, CausalConv1d
from mamba_jax.models.layers import Linear, parameter, read
from mamba_jax.models.mixers.mamba1.config import Mamba1Config
from mamba_jax.models.state import Mamba1State, MixerOutput
from mamba_jax.sharding import Axis, constrain, in_context, per_shard, product
from pallas_kernels import selective_scan, selective_state_update

# Logical axes of the recurrent state and of the scan's constants.
STATE = (Axis.BATCH, Axis.INNER, Axis.STATE)
DYNAMICS = {"A": (Axis.INNER, Axis.STATE), "D": (Axis.INNER,), "dt_bias": (Axis.INNER,)}


class Mamba1(nnx.Module):
    r"""The selective state space mixer, a layer for any model.

        x, z     = in_proj(u)
        x        = silu(conv1d(x))
        dt, B, C = x_proj(x);  dt = dt_proj(dt)
        h_t      = exp(softplus(dt_t + bias) A) h_{t-1} + softplus(dt_t + bias) B_t x_t
        y_t      = (C_t h_t + D x_t) silu(z_t)
        output   = out_proj(y)

    Those of dt, B and C that the config's `selective` does not name are learned constants. It runs with any mesh: over
    explicit axes as its input is split, over automatic axes that are called as in `MeshConfig` by our rules.

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

    def __init__(
        self,
        config: Mamba1Config | ModelConfig | None = None,
        *,
        d_model: int | None = None,
        param_dtype: DTypeLike = "float32",
        compute_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters.

        Args:
            config: of the mixer, None for the defaults; that of a language model says its width and dtypes as well.
            d_model: D, width of input and output.
            param_dtype: of the parameters.
            compute_dtype: of matrix products, activations and the output.
            rngs: source of keys.

        Raises:
            InputError: the width is missing or no positive number, or a dtype is none of the configs'.
        """
        scale = 1.0
        if isinstance(config, ModelConfig):
            if d_model is not None:
                raise InputError(f"Mamba1: d_model={d_model} besides a ModelConfig, which says it: leave one out")
            scale = config.num_layers**-0.5 if config.rescale_residual else 1.0
            d_model, param_dtype, compute_dtype = config.d_model, config.param_dtype, config.compute_dtype
            config = config.mixer
        self.config = config = config or Mamba1Config()
        self.d_model = _checked_width(d_model)
        self.inner = config.expand * self.d_model
        self.rank = config.dt_rank if config.dt_rank is not None else math.ceil(self.d_model / 16)
        self.param_dtype = _dtype_name("param_dtype", param_dtype)
        self.compute_dtype = _dtype_name("compute_dtype", compute_dtype)
        self._init_projections_and_convolution(rngs)
        self._init_step_size(rngs)
        self._init_dynamics(rngs)
        self.out_proj = self._linear(
            (self.inner, self.d_model), (Axis.INNER, Axis.EMBED), scale=scale, has_bias=config.use_bias, rngs=rngs
        )

    def _linear(
        self,
        shape: tuple[int, ...],
        axes: tuple[Axis | None, ...],
        *,
        scale: float = 1.0,
        has_bias: bool,
        rngs: nnx.Rngs,
    ) -> Linear:
        return Linear(
            shape,
            axes,
            kernel_init=initializers.fan_in(shape[0], scale=scale),
            bias_init=initializers.zeros if has_bias else None,
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
            rngs=rngs,
        )

    def _init_projections_and_convolution(self, rngs: nnx.Rngs) -> None:
        config = self.config
        self.in_proj = self._linear(
            (self.d_model, 2 if config.use_gate else 1, self.inner),
            (Axis.EMBED, None, Axis.INNER),
            has_bias=config.use_bias,
            rngs=rngs,
        )
        if config.use_conv:
            self.conv1d = CausalConv1d(
                self.inner,
                width=config.conv_width,
                use_bias=config.use_conv_bias,
                param_dtype=self.param_dtype,
                rngs=rngs,
            )
        dims = {"dt": self.rank, "B": config.state_dim, "C": config.state_dim}
        self.split_dims = [dim for name, dim in dims.items() if name in config.selective]
        if self.split_dims:
            shape = (self.inner, sum(self.split_dims))
            self.x_proj = self._linear(shape, (Axis.INNER, None), has_bias=False, rngs=rngs)

    def _init_step_size(self, rngs: nnx.Rngs) -> None:
        config = self.config
        bound = self.rank**-0.5 * config.dt_scale
        self.dt_proj = DtProjection(
            self.rank if "dt" in config.selective else None,
            self.inner,
            kernel_init=initializers.uniform(bound) if config.dt_init == "random" else initializers.constant(bound),
            bias_init=initializers.inverse_softplus_of_step(config.dt_min, config.dt_max, config.dt_init_floor),
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
            rngs=rngs,
        )

    def _init_dynamics(self, rngs: nnx.Rngs) -> None:
        config, shape = self.config, (self.inner, self.config.state_dim)
        axes, dtype = (Axis.INNER, Axis.STATE), self.param_dtype
        self.A_log = parameter(rngs, initializers.log_decay(config.a_init), shape, axes, dtype=dtype, decay=False)
        self.D = parameter(rngs, initializers.ones, shape[:1], axes[:1], dtype=dtype, decay=False)
        if "B" not in config.selective:
            self.B = parameter(rngs, initializers.ones, shape, axes, dtype=dtype, decay=False)
        if "C" not in config.selective:
            self.C = parameter(rngs, initializers.normal(1.0), shape, axes, dtype=dtype, decay=False)

    def __call__(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: Mamba1State | None = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> Float[jax.Array, "B L D"]:
        """The output of `advance` alone, for models that carry no state on."""
        return self.advance(u_BLD, state, segment_ids_BL).y

    def advance(
        self,
        u_BLD: Float[jax.Array | np.ndarray, "B L D"],
        state: Mamba1State | None = None,
        segment_ids_BL: Int[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> MixerOutput:
        """Mixes a sequence, continuing `state` if there is one.

        Args:
            u_BLD: input, (B, L, D); normalised in a residual block.
            state: from the call on the tokens before; None is the start of a sequence.
            segment_ids_BL: document of each token, (B, L); None is one document.

        Returns:
            The output (B, L, D) in the compute dtype, and the state after the last token.

        Raises:
            InputError: the input is not of this shape or has no floating dtype.
        """
        u_BLD = self._checked_input(u_BLD)
        segment_ids_BL = None if segment_ids_BL is None else jnp.asarray(segment_ids_BL)
        xz_BLPE = self.in_proj(u_BLD)
        x_BLE = constrain(xz_BLPE[:, :, 0], *SEQUENCE)
        z_BLE = constrain(xz_BLPE[:, :, 1], *SEQUENCE) if self.config.use_gate else None
        if self.config.use_conv:
            convolved = self.conv1d(x_BLE, None if state is None else state.conv_window, segment_ids_BL)
            x_BLE, window_BWE = convolved.y, convolved.final_window
        else:
            x_BLE, window_BWE = jax.nn.silu(x_BLE), x_BLE[:, :0]
        y_BLE, ssm_BEN = self._scan(x_BLE, z_BLE, None if state is None else state.ssm, segment_ids_BL)
        y_BLE = constrain(y_BLE, *SEQUENCE)
        window_BWE = window_BWE.astype(self.compute_dtype)
        return MixerOutput(y=self.out_proj(y_BLE), state=Mamba1State(conv_window=window_BWE, ssm=ssm_BEN))

    def _checked_input(self, u: Any) -> jax.Array:
        u = in_context(jnp.asarray(u))
        if u.ndim != 3 or u.shape[-1] != self.d_model or 0 in u.shape:
            raise InputError(f"Mamba1: the input has shape {u.shape}, expected non-empty (B, L, {self.d_model})")
        if not jnp.issubdtype(u.dtype, jnp.floating):
            raise InputError(f"Mamba1: the input has dtype {u.dtype}, expected a floating one")
        return u

    def _scan(
        self,
        x_BLE: jax.Array,
        z_BLE: jax.Array | None,
        ssm_BEN: jax.Array | None,
        segment_ids_BL: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        config = self.config
        dt_BLE, B, C = self._selection(x_BLE)
        if ssm_BEN is not None and x_BLE.shape[1] == 1:
            return self._update(x_BLE, z_BLE, dt_BLE, B, C, ssm_BEN)
        options: dict[str, Any] = {
            "discretization": config.discretization,
            "implementation": config.scan_implementation,
        }

        def scan_whole(**arrays: Any) -> tuple[jax.Array, jax.Array]:
            output = selective_scan(**arrays, dt_softplus=True, **options)
            return output.y, output.final_state

        past = config.conv_width - 1 if config.use_conv else 0
        is_split = sequence_parallel.is_split(x_BLE.shape[1], past=past)
        sequence = SEQUENCE if is_split else WHOLE_SEQUENCE

        def matrix_axes(matrix: jax.Array) -> tuple[Axis | None, ...]:
            return (*sequence[:2], Axis.STATE) if matrix.ndim == 3 else (Axis.INNER, Axis.STATE)

        return per_shard(
            functools.partial(sequence_parallel.scan, **options) if is_split else scan_whole,
            {
                "x": x_BLE,
                "dt": dt_BLE,
                "B": B,
                "C": C,
                "z": z_BLE,
                "initial_state": ssm_BEN,
                "segment_ids": segment_ids_BL,
                **self._dynamics(),
            },
            {
                "x": sequence,
                "dt": sequence,
                "B": matrix_axes(B),
                "C": matrix_axes(C),
                "z": sequence,
                "initial_state": STATE,
                "segment_ids": sequence[:2],
                **DYNAMICS,
            },
            (sequence, STATE),
        )

    def _update(
        self,
        x_BLE: jax.Array,
        z_BLE: jax.Array | None,
        dt_BLE: jax.Array,
        B: jax.Array,
        C: jax.Array,
        ssm_BEN: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The scan of a single token that continues a state."""

        def update(state: jax.Array, **arrays: Any) -> tuple[jax.Array, jax.Array]:
            output = selective_state_update(
                state, **arrays, dt_softplus=True, discretization=self.config.discretization
            )
            return output.y, output.state

        def matrix_axes(matrix: jax.Array) -> tuple[Axis | None, ...]:
            return (Axis.BATCH, None if matrix.ndim == 3 else Axis.INNER, Axis.STATE)

        token = (Axis.BATCH, Axis.INNER)
        y_BE, ssm_BEN = per_shard(
            update,
            {
                "x": x_BLE[:, 0],
                "dt": dt_BLE[:, 0],
                "B": _by_group(B, x_BLE.shape[0]),
                "C": _by_group(C, x_BLE.shape[0]),
                "z": None if z_BLE is None else z_BLE[:, 0],
                "state": ssm_BEN,
                **self._dynamics(),
            },
            {
                "x": token,
                "dt": token,
                "B": matrix_axes(B),
                "C": matrix_axes(C),
                "z": token,
                "state": STATE,
                **DYNAMICS,
            },
            (token, STATE),
        )
        return y_BE[:, None], ssm_BEN

    def _dynamics(self) -> dict[str, jax.Array]:
        A = -jnp.exp(read(self.A_log).astype(jnp.float32))
        return {"A": A, "D": read(self.D), "dt_bias": read(self.dt_proj.bias)}

    def _selection(self, x_BLE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Step size (B, L, E) before bias and softplus; B and C, (B, L, N) if selective and else (E, N)."""
        parts: dict[str, jax.Array] = {}
        if self.split_dims:
            offsets = [sum(self.split_dims[: i + 1]) for i in range(len(self.split_dims) - 1)]
            names = [name for name in ("dt", "B", "C") if name in self.config.selective]
            parts = dict(zip(names, jnp.split(self.x_proj(x_BLE), offsets, axis=-1), strict=True))
        dt_BLE = self.dt_proj(parts["dt"]) if "dt" in parts else jnp.zeros_like(x_BLE)
        B = parts["B"] if "B" in parts else read(self.B)
        C = parts["C"] if "C" in parts else read(self.C)
        return constrain(dt_BLE, *SEQUENCE), B, C


class DtProjection(nnx.Module):
    """Low-rank projection to the step size, (R, E); its bias is added, in float32, inside the scan's softplus."""

    def __init__(
        self,
        rank: int | None,
        channels: int,
        *,
        kernel_init: initializers.Initializer,
        bias_init: initializers.Initializer,
        param_dtype: str,
        compute_dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        axes = (Axis.DT_RANK, Axis.INNER)
        if rank is not None:
            self.kernel = parameter(rngs, kernel_init, (rank, channels), axes, dtype=param_dtype, decay=True)
        self.bias = parameter(rngs, bias_init, (channels,), axes[1:], dtype=param_dtype, decay=False)
        self.compute_dtype = compute_dtype

    def __call__(self, dt_BLR: Float[jax.Array, "B L R"]) -> Float[jax.Array, "B L E"]:
        """The step size before its bias, in the compute dtype."""
        return product(dt_BLR, read(self.kernel).astype(self.compute_dtype))


def _checked_width(d_model: int | None) -> int:
    if not isinstance(d_model, int) or d_model < 1:
        raise InputError(f"Mamba1: d_model={d_model}: give the width of its input, a positive number")
    return d_model


def _dtype_name(name: str, dtype: DTypeLike) -> str:
    known = typing.get_args(DType)
    if (given := jnp.dtype(dtype).name) not in known:
        raise InputError(f"Mamba1: {name}={given}: choose one of {', '.join(known)}")
    return given


def _by_group(matrix: jax.Array, batch_size: int) -> jax.Array:
    """B or C of one token as (B, G, N), since (B, N) and (E, N) cannot be told apart where B = E.

    (B, L, N) with L = 1 has that shape already, with one group; a constant (E, N) gives each channel its own.
    """
    return matrix if matrix.ndim == 3 else jnp.broadcast_to(matrix[None], (batch_size, *matrix.shape))
