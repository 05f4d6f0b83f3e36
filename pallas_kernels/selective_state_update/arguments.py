"""What every implementation of the state update takes and returns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Leaf
from pallas_kernels.common.checks import require, require_float, require_inexact, require_shape

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


def check_arguments(arrays: Mapping[str, Any], *, discretization: str) -> None:
    """Raises ValueError, in one line, for arguments outside the signature."""
    x, A = arrays["x"], arrays["A"]
    require(x.ndim == 2 and 0 not in x.shape, f"{OP}: x has shape {x.shape}, expected non-empty (B, E)")
    batch, channels = x.shape
    require(
        A.ndim == 2 and A.shape[0] == channels and A.shape[1] > 0,
        f"{OP}: A has shape {A.shape}, expected (E, N) with E = {channels} as in x",
    )
    states = A.shape[1]
    require_shape(OP, "state", arrays["state"], (batch, channels, states), meaning="(B, E, N)")
    for name in ("dt", "z"):
        require_shape(OP, name, arrays[name], x.shape, meaning="the shape of x")
    for name in ("D", "dt_bias"):
        require_shape(OP, name, arrays[name], (channels,), meaning="(E,)")
    matrices = {name: arrays[name] for name in ("B", "C")}
    for name, matrix in matrices.items():
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
    require_float(OP, **{name: arrays[name] for name in ("x", "dt", "D", "z", "dt_bias")})
    require_inexact(OP, complex_allowed=True, A=A)
    is_complex = jnp.issubdtype(A.dtype, jnp.complexfloating)
    require_inexact(OP, complex_allowed=is_complex, state=arrays["state"], **matrices)
    require(
        discretization in ("euler", "zoh"), f"{OP}: unknown discretization {discretization!r}; choose 'euler' or 'zoh'"
    )


def dimensions(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Letters of the dimensions of every argument, for `partitioning`; B and C are as they are run."""
    letters = {"state": "BEN", "x": "BE", "dt": "BE", "A": "EN", "D": "E", "z": "BE", "dt_bias": "E"}
    for name in ("B", "C"):
        matrix = arrays[name]
        letters[name] = "EN" if matrix.ndim == 2 else "B1N" if matrix.shape[1] == 1 else "BGN"
    return letters
