"""The Mamba-1 mixer: gated selective state space layer with a short convolution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from mamba_jax.config import ModelConfig
from mamba_jax.models import initializers, sequence_parallel
from mamba_jax.models.layers import Linear, parameter
from mamba_jax.models.recurrent_state import Mamba1State
from mamba_jax.sharding import Axis, constrain, per_shard
from pallas_kernels import causal_conv1d, selective_scan, selective_state_update

# Logical axes of x, z and dt, of the same for a sequence that is not split, and of the carried arrays.
SEQUENCE = (Axis.BATCH, Axis.LENGTH, Axis.INNER)
WHOLE_SEQUENCE = (Axis.BATCH, None, Axis.INNER)
WINDOW = (Axis.BATCH, None, Axis.INNER)
STATE = (Axis.BATCH, Axis.INNER, Axis.STATE)
DYNAMICS = {"A": (Axis.INNER, Axis.STATE), "D": (Axis.INNER,), "dt_bias": (Axis.INNER,)}


class CausalConv1d(nnx.Module):
    """Parameters of the depthwise causal convolution: `weight` (K, E), tap K - 1 for the current token, and `bias`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, inner = config.mixer.conv_width, config.d_inner
        init = initializers.fan_in(width)
        dtype = config.param_dtype
        self.weight = parameter(rngs, init, (width, inner), (Axis.CONV, Axis.INNER), dtype=dtype, decay=True)
        self.has_bias = config.mixer.use_conv_bias
        if self.has_bias:
            self.bias = parameter(rngs, init, (inner,), (Axis.INNER,), dtype=dtype, decay=False)

    def __call__(
        self,
        x_BLE: Float[jax.Array, "B L E"],
        window_BWE: Float[jax.Array, "B W E"] | None,
        segment_ids_BL: Int[jax.Array, "B L"] | None,
    ) -> tuple[Float[jax.Array, "B L E"], Float[jax.Array, "B W E"]]:
        """Convolves, applies SiLU, and returns the window that continues the sequence."""

        def convolve_whole(**arrays: Any) -> tuple[jax.Array, jax.Array]:
            output = causal_conv1d(**arrays, activation="silu")
            return output.y, output.final_window

        is_split = sequence_parallel.is_split(x_BLE.shape[1], past=self.weight.shape[0] - 1)
        sequence = SEQUENCE if is_split else WHOLE_SEQUENCE
        return per_shard(
            functools.partial(sequence_parallel.convolve, activation="silu") if is_split else convolve_whole,
            {
                "x": x_BLE,
                "weight": self.weight[...],
                "bias": self.bias[...] if self.has_bias else None,
                "initial_window": window_BWE,
                "segment_ids": segment_ids_BL,
            },
            {
                "x": sequence,
                "weight": (Axis.CONV, Axis.INNER),
                "bias": (Axis.INNER,),
                "initial_window": WINDOW,
                "segment_ids": sequence[:2],
            },
            (sequence, WINDOW),
        )


class Mamba1(nnx.Module):
    r"""The selective state space mixer.

        x, z     = in_proj(u)
        x        = silu(conv1d(x))
        dt, B, C = x_proj(x);  dt = dt_proj(dt)
        h_t      = exp(softplus(dt_t + bias) A) h_{t-1} + softplus(dt_t + bias) B_t x_t
        y_t      = (C_t h_t + D x_t) silu(z_t)
        output   = out_proj(y)

    Those of dt, B and C that `config.mixer.selective` does not name are learned constants.

    Source: arXiv 2312.00752, algorithm 2, figure 3 and section 3.4.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        mixer, inner, states, rank = config.mixer, config.d_inner, config.mixer.state_dim, config.dt_rank
        self.config = config
        dtypes: dict[str, Any] = {
            "param_dtype": config.param_dtype,
            "compute_dtype": config.compute_dtype,
            "rngs": rngs,
        }
        bias = initializers.zeros if mixer.use_bias else None
        self.in_proj = Linear(
            (config.d_model, 2 if mixer.use_gate else 1, inner),
            (Axis.EMBED, None, Axis.INNER),
            kernel_init=initializers.fan_in(config.d_model),
            bias_init=bias,
            **dtypes,
        )
        if mixer.use_conv:
            self.conv1d = CausalConv1d(config, rngs=rngs)
        self.split_dims = [dim for name, dim in (("dt", rank), ("B", states), ("C", states)) if name in mixer.selective]
        if self.split_dims:
            self.x_proj = Linear(
                (inner, sum(self.split_dims)),
                (Axis.INNER, None),
                kernel_init=initializers.fan_in(inner),
                bias_init=None,
                **dtypes,
            )
        self._init_step_size(rngs)
        self._init_dynamics(rngs)
        scale = config.num_layers**-0.5 if config.rescale_residual else 1.0
        self.out_proj = Linear(
            (inner, config.d_model),
            (Axis.INNER, Axis.EMBED),
            kernel_init=initializers.fan_in(inner, scale=scale),
            bias_init=bias,
            **dtypes,
        )

    def _init_step_size(self, rngs: nnx.Rngs) -> None:
        config, mixer, rank = self.config, self.config.mixer, self.config.dt_rank
        bound = rank**-0.5 * mixer.dt_scale
        self.dt_proj = DtProjection(
            config,
            kernel_init=initializers.uniform(bound) if mixer.dt_init == "random" else initializers.constant(bound),
            bias_init=initializers.inverse_softplus_of_step(mixer.dt_min, mixer.dt_max, mixer.dt_init_floor),
            rngs=rngs,
        )

    def _init_dynamics(self, rngs: nnx.Rngs) -> None:
        mixer, shape = self.config.mixer, (self.config.d_inner, self.config.mixer.state_dim)
        axes, dtype = (Axis.INNER, Axis.STATE), self.config.param_dtype
        self.A_log = parameter(rngs, initializers.log_decay(mixer.a_init), shape, axes, dtype=dtype, decay=False)
        self.D = parameter(rngs, initializers.ones, shape[:1], axes[:1], dtype=dtype, decay=False)
        if "B" not in mixer.selective:
            self.B = parameter(rngs, initializers.ones, shape, axes, dtype=dtype, decay=False)
        if "C" not in mixer.selective:
            self.C = parameter(rngs, initializers.normal(1.0), shape, axes, dtype=dtype, decay=False)

    def __call__(
        self,
        u_BLD: Float[jax.Array, "B L D"],
        state: Mamba1State | None,
        segment_ids_BL: Int[jax.Array, "B L"] | None,
    ) -> tuple[Float[jax.Array, "B L D"], Mamba1State]:
        """Mixes a sequence, continuing `state` if there is one.

        Args:
            u_BLD: normalised input, (B, L, D).
            state: from the call on the tokens before; None is the start of a sequence.
            segment_ids_BL: document of each token, (B, L); None is one document.

        Returns:
            The output (B, L, D) in the compute dtype, and the state after the last token.
        """
        mixer = self.config.mixer
        xz_BLPE = self.in_proj(u_BLD)
        x_BLE = constrain(xz_BLPE[:, :, 0], *SEQUENCE)
        z_BLE = constrain(xz_BLPE[:, :, 1], *SEQUENCE) if mixer.use_gate else None
        if mixer.use_conv:
            window_BWE = None if state is None else state.conv_window
            x_BLE, window_BWE = self.conv1d(x_BLE, window_BWE, segment_ids_BL)
        else:
            x_BLE, window_BWE = jax.nn.silu(x_BLE), x_BLE[:, :0]
        y_BLE, ssm_BEN = self._scan(x_BLE, z_BLE, None if state is None else state.ssm, segment_ids_BL)
        y_BLE = constrain(y_BLE, *SEQUENCE)
        window_BWE = window_BWE.astype(self.config.compute_dtype)
        return self.out_proj(y_BLE), Mamba1State(conv_window=window_BWE, ssm=ssm_BEN)

    def _scan(
        self,
        x_BLE: jax.Array,
        z_BLE: jax.Array | None,
        ssm_BEN: jax.Array | None,
        segment_ids_BL: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        mixer = self.config.mixer
        dt_BLE, B, C = self._selection(x_BLE)
        if ssm_BEN is not None and x_BLE.shape[1] == 1:
            return self._update(x_BLE, z_BLE, dt_BLE, B, C, ssm_BEN)
        options: dict[str, Any] = {
            "discretization": mixer.discretization,
            "implementation": mixer.scan_implementation,
        }

        def scan_whole(**arrays: Any) -> tuple[jax.Array, jax.Array]:
            output = selective_scan(**arrays, dt_softplus=True, **options)
            return output.y, output.final_state

        past = mixer.conv_width - 1 if mixer.use_conv else 0
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
                state, **arrays, dt_softplus=True, discretization=self.config.mixer.discretization
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
        A = -jnp.exp(self.A_log[...].astype(jnp.float32))
        return {"A": A, "D": self.D[...], "dt_bias": self.dt_proj.bias[...]}

    def _selection(self, x_BLE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Step size (B, L, E) before bias and softplus; B and C, (B, L, N) if selective and else (E, N)."""
        parts: dict[str, jax.Array] = {}
        if self.split_dims:
            offsets = [sum(self.split_dims[: i + 1]) for i in range(len(self.split_dims) - 1)]
            names = [name for name in ("dt", "B", "C") if name in self.config.mixer.selective]
            parts = dict(zip(names, jnp.split(self.x_proj(x_BLE), offsets, axis=-1), strict=True))
        dt_BLE = self.dt_proj(parts["dt"]) if "dt" in parts else jnp.zeros_like(x_BLE)
        B = parts["B"] if "B" in parts else self.B[...]
        C = parts["C"] if "C" in parts else self.C[...]
        return constrain(dt_BLE, *SEQUENCE), B, C


class DtProjection(nnx.Module):
    """Low-rank projection to the step size, (R, E); its bias is added, in float32, inside the scan's softplus."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        kernel_init: initializers.Initializer,
        bias_init: initializers.Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        shape, axes = (config.dt_rank, config.d_inner), (Axis.DT_RANK, Axis.INNER)
        if "dt" in config.mixer.selective:
            self.kernel = parameter(rngs, kernel_init, shape, axes, dtype=config.param_dtype, decay=True)
        self.bias = parameter(rngs, bias_init, shape[1:], axes[1:], dtype=config.param_dtype, decay=False)
        self.compute_dtype = config.compute_dtype

    def __call__(self, dt_BLR: Float[jax.Array, "B L R"]) -> Float[jax.Array, "B L E"]:
        """The step size before its bias, in the compute dtype."""
        return jnp.tensordot(dt_BLR, self.kernel[...].astype(self.compute_dtype), axes=1)


def _by_group(matrix: jax.Array, batch_size: int) -> jax.Array:
    """B or C of one token as (B, G, N), since (B, N) and (E, N) cannot be told apart where B = E.

    (B, L, N) with L = 1 has that shape already, with one group; a constant (E, N) gives each channel its own.
    """
    return matrix if matrix.ndim == 3 else jnp.broadcast_to(matrix[None], (batch_size, *matrix.shape))
