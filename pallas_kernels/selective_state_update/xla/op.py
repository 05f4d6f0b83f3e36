"""The state update in plain JAX; XLA fuses it into one pass over the state."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Size
from pallas_kernels.common.checks import decline_double_precision
from pallas_kernels.common.discretization import step_size, zero_order_hold_gain
from pallas_kernels.selective_scan.arguments import Discretization
from pallas_kernels.selective_state_update.arguments import OP, StateUpdateOutput


def selective_state_update(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    dt_softplus: bool,
    discretization: Discretization,
) -> StateUpdateOutput:
    """See `pallas_kernels.selective_state_update.api.selective_state_update`; B and C are (B, G, N) or (E, N).

    Raises:
        NotImplementedError: an argument is float64 or complex128.
    """
    decline_double_precision(OP, state, x, dt, A, B, C, D, z, dt_bias)
    dtype = jnp.result_type(jnp.float32, A.dtype)
    x_BE = x.astype(jnp.float32)
    bias_1E = None if dt_bias is None else dt_bias.astype(jnp.float32)[None]
    dt_BE = step_size(dt, bias_1E, dt_softplus=dt_softplus)
    dt_BE1 = dt_BE[:, :, None]
    A_1EN = A.astype(dtype)[None]
    gain = dt_BE1 if discretization == "euler" else zero_order_hold_gain(dt_BE1, A_1EN)
    injection_BEN = gain * _per_channel(B.astype(dtype), x.shape) * x_BE[:, :, None]
    state_BEN = jnp.exp(dt_BE1 * A_1EN) * state.astype(dtype) + injection_BEN
    y_BE = jnp.sum(state_BEN * _per_channel(C.astype(dtype), x.shape), axis=-1)
    if jnp.iscomplexobj(y_BE):
        y_BE = 2 * y_BE.real
    if D is not None:
        y_BE = y_BE + D.astype(jnp.float32)[None] * x_BE
    if z is not None:
        y_BE = y_BE * jax.nn.silu(z.astype(jnp.float32))
    return StateUpdateOutput(y=y_BE.astype(x.dtype), state=state_BEN)


def _per_channel(matrix: jax.Array, shape: tuple[Size, ...]) -> jax.Array:
    """(B, G, N) or (E, N) to (B, E, N), or to (1, E, N) if constant."""
    if matrix.ndim == 2:
        return matrix[None]
    return jnp.repeat(matrix, shape[1] // matrix.shape[1], axis=1)
