"""One time step of the selective scan, for token-by-token generation."""

from pallas_kernels.common.array_types import ChannelE, MatrixEN, StateBEN, TokenBE, TokenMatrix
from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.selective_scan.arguments import Discretization
from pallas_kernels.selective_state_update.arguments import StateUpdateArguments, StateUpdateOutput

_HERE, _NAME = "pallas_kernels.selective_state_update", "selective_state_update"
_dispatch = Dispatcher[StateUpdateOutput](
    op=_NAME,
    implementations={"reference": Backend(f"{_HERE}.reference", _NAME), "xla": Backend(f"{_HERE}.xla.op", _NAME)},
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
        B: input matrix: (B, G, N), where channel e belongs to group e // (E / G); or (E, N), constant over time.
        C: output matrix, (B, G, N) or (E, N); it need not have the same of the two shapes as B.
        D: (E,) skip connection; None is none.
        z: (B, E) gate; None is none.
        dt_bias: (E,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        discretization: how B is discretised: "euler" is dt B, "zoh" the exact zero-order hold, (exp(dt A) - 1) / A B.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The output y and the state after the token.

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.
        ExceptionGroup: no implementation for the platform takes them.

    Source: arXiv 2312.00752, equation 2.
    """
    arguments = StateUpdateArguments.of(
        state=state,
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        discretization=discretization,
    )
    return on_own_part(_dispatch.using(implementation), arguments, StateUpdateOutput)
