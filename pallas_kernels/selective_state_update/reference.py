"""The state update by definition: the selective scan's reference over a sequence of one token."""

import jax

from pallas_kernels.selective_scan import reference
from pallas_kernels.selective_scan.arguments import ScanArguments
from pallas_kernels.selective_state_update.arguments import StateUpdateArguments, StateUpdateOutput


def selective_state_update(arguments: StateUpdateArguments) -> StateUpdateOutput:
    """See `pallas_kernels.selective_state_update.api.selective_state_update`."""

    def with_time(array: jax.Array) -> jax.Array:
        return array[:, None]

    def matrix(array: jax.Array) -> jax.Array:
        return array if array.ndim == 2 else with_time(array)

    output = reference.selective_scan(
        ScanArguments(
            x=with_time(arguments.x),
            dt=with_time(arguments.dt),
            A=arguments.A,
            B=matrix(arguments.B),
            C=matrix(arguments.C),
            D=arguments.D,
            z=None if arguments.z is None else with_time(arguments.z),
            dt_bias=arguments.dt_bias,
            initial_state=arguments.state,
            segment_ids=None,
            dt_softplus=arguments.dt_softplus,
            discretization=arguments.discretization,
        )
    )
    return StateUpdateOutput(y=output.y[:, 0], state=output.final_state)
