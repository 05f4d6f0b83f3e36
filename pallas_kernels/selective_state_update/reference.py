"""The state update by definition: the selective scan's reference over a sequence of one token."""

import jax

from pallas_kernels.selective_scan import reference
from pallas_kernels.selective_scan.arguments import Discretization
from pallas_kernels.selective_state_update.arguments import StateUpdateOutput


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
    """See `pallas_kernels.selective_state_update.api.selective_state_update`; B and C are (B, G, N) or (E, N)."""

    def with_time(matrix: jax.Array) -> jax.Array:
        return matrix if matrix.ndim == 2 else matrix[:, None]

    output = reference.selective_scan(
        x[:, None],
        dt[:, None],
        A,
        with_time(B),
        with_time(C),
        D=D,
        z=None if z is None else z[:, None],
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        discretization=discretization,
        initial_state=state,
        segment_ids=None,
    )
    return StateUpdateOutput(y=output.y[:, 0], state=output.final_state)
