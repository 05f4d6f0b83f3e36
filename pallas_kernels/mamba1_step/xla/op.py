"""The Mamba-1 step in plain JAX: for every platform, and what kernels are compared with."""

import jax
import jax.numpy as jnp

from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, StepArguments


def mamba1_step(arguments: StepArguments) -> Mamba1StepOutput:
    """See `pallas_kernels.mamba1_step.api.mamba1_step`."""
    xz_BPE = _product(normalized(arguments), arguments.in_proj)
    x_BE, window_BWE = convolved(arguments, xz_BPE[:, 0])
    y_BE, state_BEN = advanced(arguments, x_BE, xz_BPE[:, 1])
    residual_BD = arguments.residual + _product(y_BE, arguments.out_proj).astype(arguments.residual.dtype)
    return Mamba1StepOutput(residual=residual_BD, window=window_BWE, state=state_BEN)


def normalized(arguments: StepArguments) -> jax.Array:
    """(B, D), the residual stream over its root mean square, scaled, in the compute dtype."""
    residual_BD = _wide(arguments, arguments.residual)
    mean_square_B1 = jnp.mean(jnp.square(residual_BD), axis=-1, keepdims=True)
    u_BD = residual_BD * jax.lax.rsqrt(mean_square_B1 + arguments.eps) * _wide(arguments, arguments.norm_scale)[None]
    return u_BD.astype(arguments.in_proj.dtype)


def convolved(arguments: StepArguments, x_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What convolution and SiLU make of x, and the window with x at its end."""
    inputs_BKE = jnp.concatenate([arguments.window.astype(x_BE.dtype), x_BE[:, None]], axis=1)
    taps_1KE = _wide(arguments, arguments.conv_weight)[None]
    sum_BE = jnp.sum(_wide(arguments, inputs_BKE) * taps_1KE, axis=1) + _wide(arguments, arguments.conv_bias)[None]
    return jax.nn.silu(sum_BE).astype(x_BE.dtype), inputs_BKE[:, 1:].astype(arguments.window.dtype)


def advanced(arguments: StepArguments, x_BE: jax.Array, z_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gated output of the recurrence, and its state after the token."""
    rank, states = arguments.dt_proj.shape[0], arguments.A.shape[1]
    selection_BM = _product(x_BE, arguments.x_proj)
    dt_BR, B_BN, C_BN = jnp.split(selection_BM, [rank, rank + states], axis=-1)
    dt_BE = _wide(arguments, _product(dt_BR, arguments.dt_proj)) + _wide(arguments, arguments.dt_bias)[None]
    dt_BE = jax.nn.softplus(dt_BE)
    x_BE, z_BE, B_BN, C_BN = (_wide(arguments, array) for array in (x_BE, z_BE, B_BN, C_BN))
    decay_BEN = jnp.exp(dt_BE[:, :, None] * _wide(arguments, arguments.A)[None])
    state_BEN = decay_BEN * _wide(arguments, arguments.state) + (dt_BE * x_BE)[:, :, None] * B_BN[:, None]
    y_BE = jnp.sum(state_BEN * C_BN[:, None], axis=-1) + _wide(arguments, arguments.D)[None] * x_BE
    y_BE = (y_BE * jax.nn.silu(z_BE)).astype(arguments.in_proj.dtype)
    return y_BE, state_BEN.astype(arguments.state.dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Contracts the last dimension with the first; summed in float32 and rounded to the dtype of both."""
    return jnp.tensordot(x, weight, axes=1)


def _wide(arguments: StepArguments, array: jax.Array) -> jax.Array:
    """In float32, or float64 where the residual stream is."""
    return array.astype(jnp.result_type(jnp.float32, arguments.residual.dtype))
