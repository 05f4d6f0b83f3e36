"""What every implementation of the state update takes and returns."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Leaf
from pallas_kernels.checks import require, require_float, require_inexact, require_shape

OP = "selective_state_update"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateUpdateOutput:
    """Result of one time step.

    Attributes:
        y: (B, E), dtype of x.
        state: (B, E, N) state after the token, float32 (complex64 for a complex A).
    """

    y: Leaf
    state: Leaf


def check_arguments(
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
    discretization: str,
) -> None:
    """Raises ValueError, in one line, for arguments outside the signature."""
    require(x.ndim == 2 and 0 not in x.shape, f"{OP}: x has shape {x.shape}, expected non-empty (B, E)")
    batch, channels = x.shape
    require(
        A.ndim == 2 and A.shape[0] == channels and A.shape[1] > 0,
        f"{OP}: A has shape {A.shape}, expected (E, N) with E = {channels} as in x",
    )
    states = A.shape[1]
    require_shape(OP, "state", state, (batch, channels, states), meaning="(B, E, N)")
    require_shape(OP, "dt", dt, x.shape, meaning="the shape of x")
    require_shape(OP, "z", z, x.shape, meaning="the shape of x")
    require_shape(OP, "D", D, (channels,), meaning="(E,)")
    require_shape(OP, "dt_bias", dt_bias, (channels,), meaning="(E,)")
    for name, matrix in (("B", B), ("C", C)):
        groups = matrix.shape[1] if matrix.ndim == 3 else 1
        require(
            groups > 0 and channels % groups == 0, f"{OP}: {name} has {groups} groups, which do not divide E={channels}"
        )
        allowed = ((batch, states), (batch, groups, states), (channels, states))
        require_shape(OP, name, matrix, *allowed, meaning="(B, N), (B, G, N) or (E, N)")
        require(
            matrix.ndim == 3 or batch != channels,
            f"{OP}: {name} of shape {matrix.shape} could be (B, N) or (E, N) with B = E = {batch}; give it as "
            "(B, 1, N) or, if constant, broadcast to (B, E, N)",
        )
    require_float(OP, x=x, dt=dt, D=D, z=z, dt_bias=dt_bias)
    require_inexact(OP, complex_allowed=True, A=A)
    is_complex = jnp.issubdtype(A.dtype, jnp.complexfloating)
    require_inexact(OP, complex_allowed=is_complex, state=state, B=B, C=C)
    require(
        discretization in ("euler", "zoh"), f"{OP}: unknown discretization {discretization!r}; choose 'euler' or 'zoh'"
    )
