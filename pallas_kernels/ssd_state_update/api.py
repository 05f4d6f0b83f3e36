"""One time step of `ssd`, for token-by-token generation."""

from pallas_kernels.common.array_types import HeadH, HeadSkip, HeadStateBHPN, TokenBGN, TokenBH, TokenBHP
from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.ssd.arguments import UNLIMITED
from pallas_kernels.ssd_state_update.arguments import SSDUpdateArguments, SSDUpdateOutput

_HERE, _NAME = "pallas_kernels.ssd_state_update", "ssd_state_update"
_dispatch = Dispatcher[SSDUpdateOutput](
    op=_NAME,
    implementations={"reference": Backend(f"{_HERE}.reference", _NAME), "xla": Backend(f"{_HERE}.xla.op", _NAME)},
)
IMPLEMENTATIONS = tuple(_dispatch.implementations)


def ssd_state_update(
    state: HeadStateBHPN,
    x: TokenBHP,
    dt: TokenBH,
    A: HeadH,
    B: TokenBGN,
    C: TokenBGN,
    *,
    D: HeadSkip | None = None,
    dt_bias: HeadH | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = UNLIMITED,
    implementation: str | None = None,
) -> SSDUpdateOutput:
    """Advances the recurrence of `ssd` by one token.

        h' = exp(dt A) h + dt x B^T
        y = h' C + D x

    Differentiable in every floating argument. Under explicit mesh axes rows and heads stay split as those of x are.
    NumPy arrays and nested lists are taken as well.

    Args:
        state: (B, H, P, N) state before the token.
        x: (B, H, P) input.
        dt: (B, H) step size, before bias, softplus and limits.
        A: (H,) decay rates, negative.
        B: (B, G, N) input matrix; head h belongs to group h // (H / G).
        C: (B, G, N) output matrix.
        D: (H,) or (H, P) skip connection; None is none.
        dt_bias: (H,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: least and greatest step size; a step beyond one of them is set to it and has no gradient.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The output y and the state after the token.

    Raises:
        ValueError: a shape or dtype outside the above, limits that are not in order, or an unknown name.
        NotImplementedError: the named implementation cannot take the arguments.
        ExceptionGroup: none for the platform can.

    Source: arXiv 2405.21060, equation 1 with a scalar times the identity for A.
    """
    arguments = SSDUpdateArguments.of(
        state=state,
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )
    return on_own_part(_dispatch.using(implementation), arguments, SSDUpdateOutput)
