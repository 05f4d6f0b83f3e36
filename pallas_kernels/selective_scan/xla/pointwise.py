"""What surrounds the linear recurrence h = a h + u: its coefficients, and the output made from h.

Arrays hold independent tokens on their first axis, here B: x, dt, z (B, G, F), B and C (B, G, N), states (B, G, N, F).
Constants are (1, G, N, F) for A and, if they do not change over time, for B and C; (1, G, F) for D and dt_bias.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Arrays
from pallas_kernels.common.discretization import step_size, zero_order_hold_gain
from pallas_kernels.selective_scan.arguments import Discretization


def inject(
    tokens: Arrays, masks: Arrays, constants: Arrays, *, dt_softplus: bool, discretization: Discretization
) -> tuple[jax.Array, jax.Array]:
    """Decay a = exp(dt A), zero where a segment starts, and injection u = Bbar x.

    Args:
        tokens: "x", "dt" and, unless constant, "B".
        masks: "is_valid" and "is_start" (B,), both optional; an invalid token leaves the state alone.
        constants: "A" and, where they are, "B" and "dt_bias".
        dt_softplus: apply softplus to dt.
        discretization: how B is discretised, see `selective_scan`.

    Returns:
        a and u, both (B, G, N, F).
    """
    dt_BGF = step_size(tokens["dt"], constants.get("dt_bias"), dt_softplus=dt_softplus)
    if "is_valid" in masks:
        dt_BGF = jnp.where(masks["is_valid"][:, None, None], dt_BGF, 0)
    A = constants["A"]
    dt_BG1F = dt_BGF[:, :, None, :]
    a_BGNF = jnp.exp(dt_BG1F * A)
    if "is_start" in masks:
        a_BGNF = jnp.where(masks["is_start"][:, None, None, None], 0, a_BGNF)
    x_BGF = tokens["x"].astype(jnp.float32)
    if discretization == "euler":
        u_BGNF = _outer(tokens, constants, dt_BGF * x_BGF)
    else:
        u_BGNF = zero_order_hold_gain(dt_BG1F, A) * _outer(tokens, constants, x_BGF)
    return a_BGNF, u_BGNF.astype(a_BGNF.dtype)


def emit(states_BGNF: jax.Array, tokens: Arrays, constants: Arrays) -> jax.Array:
    """Output (C h + D x) silu(z), (B, G, F), in float32; 2 Re(C h) for complex states.

    Args:
        states_BGNF: h, after the token.
        tokens: "x" and, where they are, "C" and "z".
        constants: "C" and "D", where they are.
    """
    if "C" in constants:
        y_BGF = jnp.sum(states_BGNF * constants["C"], axis=2)
    else:
        C_BGN = tokens["C"].astype(jnp.result_type(tokens["C"].dtype, jnp.float32))
        y_BGF = jnp.einsum("bgnf,bgn->bgf", states_BGNF, C_BGN, precision=jax.lax.Precision.HIGHEST)
    if jnp.iscomplexobj(y_BGF):
        y_BGF = 2 * y_BGF.real
    if "D" in constants:
        y_BGF = y_BGF + constants["D"] * tokens["x"].astype(jnp.float32)
    if "z" in tokens:
        y_BGF = y_BGF * jax.nn.silu(tokens["z"].astype(jnp.float32))
    return y_BGF


def _outer(tokens: Arrays, constants: Arrays, x_BGF: jax.Array) -> jax.Array:
    """B x, (B, G, N, F)."""
    if "B" in constants:
        return constants["B"] * x_BGF[:, :, None, :]
    B_BGN = tokens["B"].astype(jnp.result_type(tokens["B"].dtype, jnp.float32))
    return jnp.einsum("bgn,bgf->bgnf", B_BGN, x_BGF, precision=jax.lax.Precision.HIGHEST)
