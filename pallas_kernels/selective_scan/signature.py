"""What every implementation of the selective scan takes and returns."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Leaf
from pallas_kernels.checks import require, require_float, require_inexact, require_shape

OP = "selective_scan"
Discretization = Literal["euler", "zoh"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanOutput:
    """Result of a selective scan.

    Attributes:
        y: (B, L, E), dtype of x.
        final_state: (B, E, N) state after the last token, float32 (complex64 for a complex A).
    """

    y: Leaf
    final_state: Leaf


def check_arguments(
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
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> None:
    """Raises ValueError, in one line, for arguments outside the signature."""
    require(x.ndim == 3 and 0 not in x.shape, f"{OP}: x has shape {x.shape}, expected non-empty (B, L, E)")
    batch, length, channels = x.shape
    require(
        A.ndim == 2 and A.shape[0] == channels and A.shape[1] > 0,
        f"{OP}: A has shape {A.shape}, expected (E, N) with E = {channels} as in x",
    )
    states = A.shape[1]
    require_shape(OP, "dt", dt, x.shape, meaning="the shape of x")
    require_shape(OP, "z", z, x.shape, meaning="the shape of x")
    require_shape(OP, "D", D, (channels,), meaning="(E,)")
    require_shape(OP, "dt_bias", dt_bias, (channels,), meaning="(E,)")
    require_shape(OP, "initial_state", initial_state, (batch, channels, states), meaning="(B, E, N)")
    require_shape(OP, "segment_ids", segment_ids, (batch, length), meaning="(B, L)")
    for name, matrix in (("B", B), ("C", C)):
        groups = matrix.shape[2] if matrix.ndim == 4 else 1
        require(
            groups > 0 and channels % groups == 0, f"{OP}: {name} has {groups} groups, which do not divide E={channels}"
        )
        allowed = ((batch, length, states), (batch, length, groups, states), (channels, states))
        require_shape(OP, name, matrix, *allowed, meaning="(B, L, N), (B, L, G, N) or (E, N)")
    if B.ndim == C.ndim == 4:
        require(
            B.shape[2] == C.shape[2] or 1 in (B.shape[2], C.shape[2]),
            f"{OP}: B has {B.shape[2]} groups and C has {C.shape[2]}, expected equal numbers",
        )
    require_float(OP, x=x, dt=dt, D=D, z=z, dt_bias=dt_bias)
    require_inexact(OP, complex_allowed=True, A=A)
    is_complex = jnp.issubdtype(A.dtype, jnp.complexfloating)
    require_inexact(OP, complex_allowed=is_complex, B=B, C=C, initial_state=initial_state)
    require(
        segment_ids is None or jnp.issubdtype(segment_ids.dtype, jnp.integer),
        f"{OP}: segment_ids has dtype {getattr(segment_ids, 'dtype', None)}, expected an integer dtype",
    )
    require(
        discretization in ("euler", "zoh"), f"{OP}: unknown discretization {discretization!r}; choose 'euler' or 'zoh'"
    )
