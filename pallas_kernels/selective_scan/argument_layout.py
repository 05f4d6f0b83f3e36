"""The arguments of a scan, brought into the shapes that implementations work on."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.array_types import Size
from pallas_kernels.common.checks import decline_symbolic_sizes
from pallas_kernels.selective_scan.arguments import OP, Discretization

SLOWEST = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """What a kernel does besides the recurrence.

    Attributes:
        softplus: apply it to dt.
        checkpoints: the forward kernel writes the states that the backward kernel starts from.
    """

    softplus: bool
    checkpoints: bool = False


def pad_channels(array: jax.Array, *, groups: int, channels: int) -> jax.Array:
    """(..., E) to (..., G F) for G groups, each padded with zeros to F channels."""
    if array.shape[-1] == groups * channels:
        return array
    grouped = array.reshape(*array.shape[:-1], groups, -1)
    padding = channels - grouped.shape[-1]
    grouped = jnp.pad(grouped, ((0, 0),) * (grouped.ndim - 1) + ((0, padding),))
    return grouped.reshape(*array.shape[:-1], groups * channels)


def unpad_channels(array: jax.Array, *, groups: int, channels: int) -> jax.Array:
    """(..., G F) to the (..., E) that `pad_channels` has padded; E is `channels`."""
    if array.shape[-1] == channels:
        return array
    grouped = array.reshape(*array.shape[:-1], groups, -1)
    return grouped[..., : channels // groups].reshape(*array.shape[:-1], channels)


def group_count(*matrices: jax.Array) -> int:
    """Groups of B and C, of which one may have a single group for all channels."""
    return max(matrix.shape[2] if matrix.ndim == 4 else 1 for matrix in matrices)


def per_group(matrix: jax.Array, groups: int) -> jax.Array:
    """(B, L, N) or (B, L, 1 or G, N) to (B, L, G, N)."""
    matrix = matrix[:, :, None] if matrix.ndim == 3 else matrix
    return jnp.broadcast_to(matrix, (*matrix.shape[:2], groups, matrix.shape[3]))


def round_up(size: Size, multiple: int) -> Size:
    """The least multiple that is not less."""
    return -(-size // multiple) * multiple


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """(B, L), whether the state is zero before a token; the first token continues the initial state."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def decay_rates(A: jax.Array) -> jax.Array:
    """A in float32, nowhere slower than SLOWEST: a state that does not decay ends at a segment's start all the same.

    The kernels mark such a start by a step size of 3e38, whose decay must be zero.
    """
    A = A.astype(jnp.float32)
    return jnp.where(jnp.abs(A) < SLOWEST, -SLOWEST, A)


def decline_unusual(
    implementation: str,
    arrays: dict[str, jax.Array],
    *,
    discretization: Discretization,
    max_states: int,
) -> None:
    """Raises NotImplementedError, with the reason, for what the Pallas kernels do not do."""
    A, B, C = arrays["A"], arrays["B"], arrays["C"]
    decline_symbolic_sizes(OP, implementation, arrays["x"], A)
    if jnp.issubdtype(A.dtype, jnp.complexfloating):
        raise NotImplementedError(f"{OP}: {implementation!r} takes a real A only, got {A.dtype}")
    if B.ndim == 2 or C.ndim == 2:
        raise NotImplementedError(
            f"{OP}: {implementation!r} takes B and C with a time axis only, got {B.shape}, {C.shape}"
        )
    if discretization != "euler":
        raise NotImplementedError(f"{OP}: {implementation!r} discretizes with 'euler' only, got {discretization!r}")
    if A.shape[1] > max_states:
        raise NotImplementedError(f"{OP}: {implementation!r} takes at most {max_states} states, got {A.shape[1]}")
    for name in ("x", "dt", "z", "B", "C"):
        if name in arrays and arrays[name].dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(
                f"{OP}: {implementation!r} takes float32 and bfloat16, {name} has {arrays[name].dtype}"
            )
    if A.dtype == jnp.float64:
        raise NotImplementedError(f"{OP}: {implementation!r} computes in float32 and would round A in float64")
