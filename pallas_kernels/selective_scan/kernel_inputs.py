"""What the Pallas kernels of the scan share before they start: which calls they take, and the decay rates."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.common.arguments import Arguments
from pallas_kernels.common.checks import decline_symbolic_sizes

MAX_STATES = 256
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


def decay_rates(A: jax.Array) -> jax.Array:
    """A in float32, nowhere slower than SLOWEST: a state that does not decay ends at a segment's start all the same.

    The kernels mark such a start by a step size of 3e38, whose decay must be zero.
    """
    A = A.astype(jnp.float32)
    return jnp.where(jnp.abs(A) < SLOWEST, -SLOWEST, A)


def decline_unusual(implementation: str, arguments: Arguments) -> None:
    """Raises NotImplementedError, with the reason, for what the Pallas kernels do not do."""
    op, arrays = arguments.op, arguments.arrays()
    A, leading = arrays["A"], next(iter(arrays.values()))
    matrices = {name: arrays[name] for name in ("B", "C") if name in arrays}
    decline_symbolic_sizes(op, implementation, leading, A)
    if jnp.issubdtype(A.dtype, jnp.complexfloating):
        raise NotImplementedError(f"{op}: {implementation!r} takes a real A only, got {A.dtype}")
    if any(matrix.ndim == 2 for matrix in matrices.values()):
        names, shapes = " and ".join(matrices), ", ".join(str(matrix.shape) for matrix in matrices.values())
        raise NotImplementedError(f"{op}: {implementation!r} takes {names} with a time axis only, got {shapes}")
    if (discretization := getattr(arguments, "discretization", "euler")) != "euler":
        raise NotImplementedError(f"{op}: {implementation!r} discretizes with 'euler' only, got {discretization!r}")
    if A.shape[1] > MAX_STATES:
        raise NotImplementedError(f"{op}: {implementation!r} takes at most {MAX_STATES} states, got {A.shape[1]}")
    for name, array in arrays.items():
        if name in ("x", "dy", "dt", "z", "B", "C") and array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"{op}: {implementation!r} takes float32 and bfloat16, {name} has {array.dtype}")
    if A.dtype == jnp.float64:
        raise NotImplementedError(f"{op}: {implementation!r} computes in float32 and would round A in float64")
