"""One time step of the selective scan, for token-by-token generation."""

from typing import Any

from jax import Array

from pallas_kernels.common.array_types import ChannelE, MatrixEN, StateBEN, TokenBE, TokenMatrix
from pallas_kernels.common.checks import as_arrays
from pallas_kernels.common.dispatch import Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.selective_scan.arguments import Discretization
from pallas_kernels.selective_state_update import reference
from pallas_kernels.selective_state_update.arguments import OP, StateUpdateOutput, check_arguments, dimensions
from pallas_kernels.selective_state_update.xla import op as xla

_dispatch = Dispatcher[StateUpdateOutput](
    op=OP, implementations={"reference": reference.selective_state_update, "xla": xla.selective_state_update}
)
IMPLEMENTATIONS = tuple(_dispatch.implementations)


def selective_state_update(
    state: StateBEN,
    x: TokenBE,
    dt: TokenBE,
    A: MatrixEN,
    B: TokenMatrix,
    C: TokenMatrix,
    *,
    D: ChannelE | None = None,
    z: TokenBE | None = None,
    dt_bias: ChannelE | None = None,
    dt_softplus: bool = False,
    discretization: Discretization = "euler",
    implementation: str | None = None,
) -> StateUpdateOutput:
    """Advances the recurrence of `selective_scan` by one token.

        h' = exp(dt A) h + Bbar x
        y = (sum_n C h' + D x) silu(z)

    Differentiable in every floating argument. Under explicit mesh axes rows and channels stay split as those of x are.
    NumPy arrays and nested lists are taken as well.

    Args:
        state: (B, E, N) state before the token.
        x: (B, E) input.
        dt: (B, E) step size, before bias and softplus; after them it must not be negative.
        A: (E, N) decay rates, real part negative; a zero is not allowed with "zoh". Real or complex.
        B: input matrix: (B, N); (B, G, N), where channel e belongs to group e // (E / G); or (E, N), constant.
        C: output matrix, shaped like B or by itself any of the three.
        D: (E,) skip connection; None is none.
        z: (B, E) gate; None is none.
        dt_bias: (E,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        discretization: "euler" or "zoh", of B.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The output y and the state after the token.

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name. Two-dimensional B and C are refused where
            the batch size equals E, because they could mean either.
        NotImplementedError: the named implementation does not take the arguments.
        ExceptionGroup: no implementation for the platform takes them.

    Source: arXiv 2312.00752, equation 2.
    """
    required = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C}
    arrays = as_arrays(OP, required, {"D": D, "z": z, "dt_bias": dt_bias})
    check_arguments(arrays, discretization=discretization)
    # From here on two dimensions are (E, N), whatever part of the batch or the channels a device has.
    arrays |= {name: arrays[name][:, None] for name in ("B", "C") if arrays[name].shape[:-1] == arrays["x"].shape[:1]}
    options = {"dt_softplus": dt_softplus, "discretization": discretization, "implementation": implementation}

    def run(arrays: dict[str, Any]) -> tuple[Array, Array]:
        output = _dispatch(**arrays, **options)
        return output.y, output.state

    y, state = on_own_part(run, arrays, dimensions(arrays), ("BE", "BEN"))
    return StateUpdateOutput(y=y, state=state)
