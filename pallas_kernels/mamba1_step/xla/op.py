"""The Mamba-1 step in plain JAX: for every platform, and what kernels are compared with."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.xla import token
from pallas_kernels.common.xla.token import product
from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, StepArguments


def mamba1_step(arguments: StepArguments) -> Mamba1StepOutput:
    """See `pallas_kernels.mamba1_step.api.mamba1_step`."""
    xz_BPE = product(normalized(arguments), arguments.in_proj, arguments.in_proj_scale)
    x_BE, window_BWE = token.convolved(
        xz_BPE[:, 0],
        arguments.window,
        weight_KE=arguments.conv_weight,
        bias_E=arguments.conv_bias,
        residual=arguments.residual,
    )
    y_BE, state_BEN = advanced(arguments, x_BE, xz_BPE[:, 1])
    output_BD = product(y_BE, arguments.out_proj, arguments.out_proj_scale)
    residual_BD = arguments.residual + output_BD.astype(arguments.residual.dtype)
    return Mamba1StepOutput(residual=residual_BD, window=window_BWE, state=state_BEN)


def normalized(arguments: StepArguments) -> jax.Array:
    """(B, D), the residual stream over its root mean square, scaled, in the compute dtype."""
    dtype = arguments.compute_dtype
    return token.normalized(arguments.residual, arguments.norm_scale, eps=arguments.eps, dtype=dtype)


def advanced(arguments: StepArguments, x_BE: jax.Array, z_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gated output of the recurrence, and its state after the token."""
    rank, states = arguments.dt_proj.shape[0], arguments.A_log.shape[1]
    selection_BM = product(x_BE, arguments.x_proj, arguments.x_proj_scale)
    dt_BR, B_BN, C_BN = jnp.split(selection_BM, [rank, rank + states], axis=-1)
    dt_BE = _wide(arguments, product(dt_BR, arguments.dt_proj, arguments.dt_proj_scale))
    dt_BE = dt_BE + _wide(arguments, arguments.dt_bias)[None]
    dt_BE = jax.nn.softplus(dt_BE)
    x_BE, z_BE, B_BN, C_BN = (_wide(arguments, array) for array in (x_BE, z_BE, B_BN, C_BN))
    decay_BEN = jnp.exp(-dt_BE[:, :, None] * jnp.exp(_wide(arguments, arguments.A_log))[None])
    state_BEN = decay_BEN * _wide(arguments, arguments.state) + (dt_BE * x_BE)[:, :, None] * B_BN[:, None]
    y_BE = jnp.sum(state_BEN * C_BN[:, None], axis=-1) + _wide(arguments, arguments.D)[None] * x_BE
    y_BE = (y_BE * jax.nn.silu(z_BE)).astype(arguments.compute_dtype)
    return y_BE, state_BEN.astype(arguments.state.dtype)


def _wide(arguments: StepArguments, array: jax.Array) -> jax.Array:
    return token.wide(array, arguments.residual)
