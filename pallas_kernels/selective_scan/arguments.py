"""What every implementation of the selective scan takes and returns."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Leaf, Size
from pallas_kernels.common.checks import require, require_float, require_inexact, require_integer, require_shape

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
    arrays: Mapping[str, jax.Array | None], *, discretization: str, op: str = OP, sequence: str = "x"
) -> None:
    """Raises ValueError, in one line, for arguments outside the signature.

    Args:
        arrays: by name; B or C may be missing.
        discretization: of B.
        op: name of the op, for messages.
        sequence: the argument whose shape the others follow.
    """
    x, A = arrays[sequence], arrays["A"]
    assert x is not None
    assert A is not None
    require(x.ndim == 3 and 0 not in x.shape, f"{op}: {sequence} has shape {x.shape}, expected non-empty (B, L, E)")
    batch, length, channels = x.shape
    require(
        A.ndim == 2 and A.shape[0] == channels and A.shape[1] > 0,
        f"{op}: A has shape {A.shape}, expected (E, N) with E = {channels} as in {sequence}",
    )
    states = A.shape[1]
    for name in ("dt", "z"):
        require_shape(op, name, arrays.get(name), x.shape, meaning=f"the shape of {sequence}")
    for name in ("D", "dt_bias"):
        require_shape(op, name, arrays.get(name), (channels,), meaning="(E,)")
    require_shape(op, "initial_state", arrays.get("initial_state"), (batch, channels, states), meaning="(B, E, N)")
    require_shape(op, "segment_ids", arrays.get("segment_ids"), (batch, length), meaning="(B, L)")
    matrices = {name: matrix for name in ("B", "C") if (matrix := arrays.get(name)) is not None}
    _check_matrices(op, matrices, batch=batch, length=length, channels=channels, states=states)
    require_float(op, **{name: arrays.get(name) for name in (sequence, "dt", "D", "z", "dt_bias")})
    require_inexact(op, complex_allowed=True, A=A)
    is_complex = jnp.issubdtype(A.dtype, jnp.complexfloating)
    require_inexact(op, complex_allowed=is_complex, **matrices, initial_state=arrays.get("initial_state"))
    require_integer(op, segment_ids=arrays.get("segment_ids"))
    require(
        discretization in ("euler", "zoh"), f"{op}: unknown discretization {discretization!r}; choose 'euler' or 'zoh'"
    )


def _check_matrices(
    op: str, matrices: dict[str, jax.Array], *, batch: Size, length: Size, channels: int, states: int
) -> None:
    counts = {name: matrix.shape[2] for name, matrix in matrices.items() if matrix.ndim == 4}
    for name, matrix in matrices.items():
        groups = counts.get(name, 1)
        require(
            groups > 0 and channels % groups == 0, f"{op}: {name} has {groups} groups, which do not divide E={channels}"
        )
        allowed = ((batch, length, states), (batch, length, groups, states), (channels, states))
        require_shape(op, name, matrix, *allowed, meaning="(B, L, N), (B, L, G, N) or (E, N)")
    require(
        len(set(counts.values()) - {1}) < 2,
        f"{op}: B has {counts.get('B')} groups and C has {counts.get('C')}, expected equal numbers",
    )


def dimensions(arrays: Mapping[str, jax.Array | None]) -> dict[str, str]:
    """Letters of the dimensions of every argument that is not None, for `pallas_kernels.common.partitioning`."""
    letters = {"A": "EN", "D": "E", "dt_bias": "E", "initial_state": "BEN", "segment_ids": "BL"}

    def of(name: str, array: jax.Array) -> str:
        if name not in ("B", "C"):
            return letters.get(name, "BLE")
        return {2: "EN", 3: "BLN", 4: "BL1N" if array.shape[-2] == 1 else "BLGN"}[array.ndim]

    return {name: of(name, array) for name, array in arrays.items() if array is not None}
