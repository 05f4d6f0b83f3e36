"""The selective scan, token by token and straight from its equations: the oracle of every other implementation.

It computes in float64 (complex128) if an argument has that precision and in float32 (complex64) otherwise.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Size
from pallas_kernels.selective_scan.arguments import ScanArguments, ScanOutput


def selective_scan(arguments: ScanArguments) -> ScanOutput:
    """See `pallas_kernels.selective_scan.api.selective_scan`."""
    x_BLE, dt_BLE, A_EN, D, z, dt_bias = (getattr(arguments, name) for name in ("x", "dt", "A", "D", "z", "dt_bias"))
    batch, length, channels = x_BLE.shape
    is_double = any(array.dtype in (jnp.float64, jnp.complex128) for array in arguments.arrays().values())
    real = jnp.float64 if is_double else jnp.float32
    is_complex = jnp.issubdtype(A_EN.dtype, jnp.complexfloating)
    state_dtype = jnp.result_type(real, jnp.complex64) if is_complex else real

    A_EN = A_EN.astype(state_dtype)
    x_LBE = jnp.moveaxis(x_BLE, 1, 0).astype(real)
    dt_LBE = jnp.moveaxis(dt_BLE, 1, 0).astype(real)
    if dt_bias is not None:
        dt_LBE = dt_LBE + dt_bias.astype(real)[None, None, :]
    if arguments.dt_softplus:
        dt_LBE = jnp.logaddexp(dt_LBE, jnp.zeros_like(dt_LBE))
    B_LBEN = _per_channel(arguments.B.astype(state_dtype), x_BLE.shape)
    C_LBEN = _per_channel(arguments.C.astype(state_dtype), x_BLE.shape)
    reset_LB = jnp.zeros((length, batch), bool)
    if (ids := arguments.segment_ids) is not None:
        reset_LB = reset_LB.at[1:].set(ids.T[1:] != ids.T[:-1])
    initial_state = arguments.initial_state
    if initial_state is None:
        initial_state = jnp.zeros_like(x_BLE, shape=(batch, channels, A_EN.shape[1]))
    state_BEN = initial_state.astype(state_dtype)

    def step(state_BEN, inputs):
        x_BE, dt_BE, B_BEN, C_BEN, reset_B = inputs
        exponent_BEN = dt_BE[:, :, None] * A_EN[None]
        if arguments.discretization == "euler":
            gain_BEN = dt_BE[:, :, None] * B_BEN
        else:
            gain_BEN = jnp.expm1(exponent_BEN) / A_EN[None] * B_BEN
        state_BEN = jnp.where(reset_B[:, None, None], 0, state_BEN)
        state_BEN = jnp.exp(exponent_BEN) * state_BEN + gain_BEN * x_BE[:, :, None]
        y_BE = jnp.sum(C_BEN * state_BEN, axis=-1)
        return state_BEN, 2 * y_BE.real if is_complex else y_BE

    state_BEN, y_LBE = jax.lax.scan(step, state_BEN, (x_LBE, dt_LBE, B_LBEN, C_LBEN, reset_LB))
    if D is not None:
        y_LBE = y_LBE + D.astype(real)[None, None, :] * x_LBE
    y_BLE = jnp.moveaxis(y_LBE, 0, 1)
    if z is not None:
        y_BLE = y_BLE * jax.nn.silu(z.astype(real))
    return ScanOutput(y=y_BLE.astype(x_BLE.dtype), final_state=state_BEN)


def _per_channel(matrix: jax.Array, shape: tuple[Size, ...]) -> jax.Array:
    """The matrix of every token and channel, (L, B, E, N), from any of the three accepted layouts."""
    batch, length, channels = shape
    if matrix.ndim == 2:
        return jnp.broadcast_to(matrix[None, None], (length, batch, *matrix.shape))
    if matrix.ndim == 3:
        matrix = matrix[:, :, None, :]
    return jnp.moveaxis(jnp.repeat(matrix, channels // matrix.shape[2], axis=2), 1, 0)
