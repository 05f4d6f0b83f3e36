"""The Mamba-2 step in plain JAX: for every platform, and what kernels are compared with."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.xla import token
from pallas_kernels.common.xla.token import product
from pallas_kernels.mamba2_step.arguments import Mamba2Carry, StepArguments
from pallas_kernels.mamba2_step.xla.replay import placed, ring_of, step_size


def mamba2_step(arguments: StepArguments) -> Mamba2Carry:
    """See `pallas_kernels.mamba2_step.api.mamba2_step`."""
    u_BD = normalized(arguments)
    zx_B2E = product(u_BD, arguments.in_proj, arguments.in_proj_scale)
    dt_BH = product(u_BD, arguments.dt_proj, arguments.dt_proj_scale)
    BC_BM = product(u_BD, arguments.BC_proj, arguments.BC_proj_scale).reshape(u_BD.shape[0], -1)
    x_BE, window_BWE = token.convolved(
        zx_B2E[:, 1],
        arguments.window,
        weight_KE=arguments.conv_weight,
        bias_E=arguments.conv_bias,
        residual=arguments.residual,
    )
    BC_BM, window_BWM = token.convolved(
        BC_BM,
        arguments.BC_window,
        weight_KE=arguments.BC_conv_weight,
        bias_E=arguments.BC_conv_bias,
        residual=arguments.residual,
    )
    y_BE, carried = (advanced if arguments.ring_x is None else replayed)(arguments, x_BE, BC_BM, dt_BH)
    gated_BE = _wide(arguments, y_BE) * jax.nn.silu(_wide(arguments, zx_B2E[:, 0]))
    residual_BD = projected(arguments, gated_BE)
    return Mamba2Carry(residual=residual_BD, window=window_BWE, BC_window=window_BWM, **carried)


def normalized(arguments: StepArguments) -> jax.Array:
    """(B, D), the residual stream over its root mean square, scaled, in the compute dtype."""
    dtype = arguments.compute_dtype
    return token.normalized(arguments.residual, arguments.norm_scale, eps=arguments.eps, dtype=dtype)


def advanced(
    arguments: StepArguments, x_BE: jax.Array, BC_BM: jax.Array, dt_BH: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The output of the recurrence (B, E) before its gate, rounded, and its state after the token."""
    batch, heads, width, states = arguments.state.shape
    groups = arguments.BC_proj.shape[2]
    dt_BH = _step_size(arguments, dt_BH)
    x_BHP = _wide(arguments, x_BE).reshape(batch, heads, width)
    BC_B2HN = jnp.repeat(_wide(arguments, BC_BM).reshape(batch, 2, groups, states), heads // groups, axis=2)
    decay_BH = jnp.exp(-dt_BH * jnp.exp(_wide(arguments, arguments.A_log))[None])
    inflow_BHPN = (dt_BH[:, :, None] * x_BHP)[..., None] * BC_B2HN[:, 0, :, None]
    state_BHPN = decay_BH[:, :, None, None] * _wide(arguments, arguments.state) + inflow_BHPN
    y_BHP = jnp.sum(state_BHPN * BC_B2HN[:, 1, :, None], axis=-1)
    y_BHP += _wide(arguments, arguments.D).reshape(1, heads, -1) * x_BHP
    return y_BHP.astype(x_BE.dtype).reshape(x_BE.shape), {"state": state_BHPN.astype(arguments.state.dtype)}


def replayed(
    arguments: StepArguments, x_BE: jax.Array, BC_BM: jax.Array, dt_BH: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`advanced` with a ring: the state takes its tokens in when it is full."""
    assert arguments.ring_x is not None
    assert arguments.ring_length is not None
    batch, heads, _, states = arguments.state.shape
    B_BR, C_BR = jnp.split(BC_BM, 2, axis=1)
    place_B, length = arguments.ring_length, arguments.ring_x.shape[1]
    arrays = {
        name: placed(getattr(arguments, name), new.astype(getattr(arguments, name).dtype), place_B)
        for name, new in (("ring_x", x_BE), ("ring_B", B_BR), ("ring_dt", dt_BH))
    }
    ring = ring_of(
        _wide(arguments, arrays["ring_x"]),
        _wide(arguments, arrays["ring_B"]),
        _step_size(arguments, arrays["ring_dt"]),
        length_B=place_B + 1,
        states=states,
    )
    A_H = -jnp.exp(_wide(arguments, arguments.A_log))
    state_BHPN = _wide(arguments, arguments.state)
    C_BHN = jnp.repeat(_wide(arguments, C_BR).reshape(batch, -1, states), heads // arguments.BC_proj.shape[2], axis=1)
    x_BHP = _wide(arguments, x_BE).reshape(batch, heads, -1)
    y_BHP = ring.read(state_BHPN, C_BHN, A_H) + _wide(arguments, arguments.D).reshape(1, heads, -1) * x_BHP
    is_full_B = place_B + 1 == length
    state_BHPN = jnp.where(is_full_B[:, None, None, None], ring.settled(state_BHPN, A_H), state_BHPN)
    carried = {"state": state_BHPN.astype(arguments.state.dtype), "ring_length": jnp.where(is_full_B, 0, place_B + 1)}
    return y_BHP.astype(x_BE.dtype).reshape(x_BE.shape), carried | arrays


def _step_size(arguments: StepArguments, dt: jax.Array) -> jax.Array:
    return step_size(_wide(arguments, dt), _wide(arguments, arguments.dt_bias), arguments.dt_limit)


def gated_norm(arguments: StepArguments, gated_BE: jax.Array) -> jax.Array:
    """(B, E), what the gate gated over its root mean square in groups of channels, scaled, in the compute dtype."""
    batch, channels = gated_BE.shape
    grouped = gated_BE.reshape(batch, -1, arguments.group_size)
    normed_BE = token.over_root_mean_square(grouped, arguments.gated_norm_eps).reshape(batch, channels)
    return (normed_BE * _wide(arguments, arguments.gated_norm_scale)[None]).astype(arguments.compute_dtype)


def projected(arguments: StepArguments, gated_BE: jax.Array) -> jax.Array:
    """The residual stream after the block, from what the gate gated."""
    output_BD = product(gated_norm(arguments, gated_BE), arguments.out_proj, arguments.out_proj_scale)
    return arguments.residual + output_BD.astype(arguments.residual.dtype)


def _wide(arguments: StepArguments, array: jax.Array) -> jax.Array:
    return token.wide(array, arguments.residual)
