"""The state update in plain JAX; XLA fuses it into one pass over the state."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Size
from pallas_kernels.common.checks import decline_double_precision
from pallas_kernels.common.discretization import step_size, zero_order_hold_gain
from pallas_kernels.selective_state_update.arguments import StateUpdateArguments, StateUpdateOutput


def selective_state_update(arguments: StateUpdateArguments) -> StateUpdateOutput:
    """See `pallas_kernels.selective_state_update.api.selective_state_update`.

    Raises:
        NotImplementedError: an argument is float64 or complex128.
    """
    decline_double_precision("xla", arguments)
    x, A, D, z, dt_bias = (getattr(arguments, name) for name in ("x", "A", "D", "z", "dt_bias"))
    dtype = jnp.result_type(jnp.float32, A.dtype)
    x_BE = x.astype(jnp.float32)
    bias_1E = None if dt_bias is None else dt_bias.astype(jnp.float32)[None]
    dt_BE = step_size(arguments.dt, bias_1E, dt_softplus=arguments.dt_softplus)
    dt_BE1 = dt_BE[:, :, None]
    A_1EN = A.astype(dtype)[None]
    gain = dt_BE1 if arguments.discretization == "euler" else zero_order_hold_gain(dt_BE1, A_1EN)
    injection_BEN = gain * _per_channel(arguments.B.astype(dtype), x.shape) * x_BE[:, :, None]
    state_BEN = jnp.exp(dt_BE1 * A_1EN) * arguments.state.astype(dtype) + injection_BEN
    y_BE = jnp.sum(state_BEN * _per_channel(arguments.C.astype(dtype), x.shape), axis=-1)
    if jnp.iscomplexobj(y_BE):
        # Complex states stand for conjugate pairs, of which one is stored; both contribute the same real part.
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
