"""The one-token form of `ssd` in plain JAX; XLA fuses it into one pass over the state."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.checks import decline_double_precision
from pallas_kernels.ssd_state_update.arguments import SSDUpdateArguments, SSDUpdateOutput


def ssd_state_update(arguments: SSDUpdateArguments) -> SSDUpdateOutput:
    """See `pallas_kernels.ssd_state_update.api.ssd_state_update`.

    Raises:
        NotImplementedError: an argument is float64.
    """
    decline_double_precision("xla", arguments)
    core = arguments.core()
    heads, groups = arguments.x.shape[1], arguments.B.shape[1]

    def per_head(array_BGN: jax.Array) -> jax.Array:
        return jnp.repeat(array_BGN.astype(jnp.float32), heads // groups, axis=1)[:, :, None]

    x_BHP = arguments.x.astype(jnp.float32)
    injection_BHPN = (core.scale[:, 0, :, None] * x_BHP)[..., None] * per_head(arguments.B)
    decay_BH11 = jnp.exp(core.log_decay[:, 0])[:, :, None, None]
    state_BHPN = decay_BH11 * arguments.state.astype(jnp.float32) + injection_BHPN
    y_BHP = jnp.sum(state_BHPN * per_head(arguments.C), axis=-1)
    if arguments.D is not None:
        y_BHP += arguments.D.astype(jnp.float32).reshape(1, heads, -1) * x_BHP
    return SSDUpdateOutput(y=y_BHP.astype(arguments.x.dtype), state=state_BHPN)
