"""State-space duality: the recurrence at the heart of Mamba-2."""

from pallas_kernels.common.array_types import (
    HeadH,
    HeadSkip,
    HeadStateBHPN,
    SegmentsBL,
    SequenceBLGN,
    SequenceBLH,
    SequenceBLHP,
)
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.ssd import core
from pallas_kernels.ssd.arguments import UNLIMITED, SSDArguments, SSDOutput

IMPLEMENTATIONS = core.IMPLEMENTATIONS


def ssd(
    x: SequenceBLHP,
    dt: SequenceBLH,
    A: HeadH,
    B: SequenceBLGN,
    C: SequenceBLGN,
    *,
    D: HeadSkip | None = None,
    dt_bias: HeadH | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = UNLIMITED,
    initial_state: HeadStateBHPN | None = None,
    segment_ids: SegmentsBL | None = None,
    implementation: str | None = None,
) -> SSDOutput:
    r"""Runs a linear recurrence over a sequence whose states, a matrix for each head, decay by one factor a token.

    For every batch row and head h, with dt_t = softplus(dt_t + dt_bias) if `dt_softplus`, then kept within `dt_limit`,
    and B_t and C_t those of the head's group:

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t

    Differentiable in every floating argument, through both outputs: in reverse mode, and but for the kernels in forward
    mode. The state is float32 throughout, and a decay is the exponential of a sum over the tokens between two, never a
    quotient of two: no decay is too strong. Under explicit mesh axes rows and heads stay split as those of x are.
    NumPy arrays and nested lists are taken as well.

    Args:
        x: (B, L, H, P) input of H heads.
        dt: (B, L, H) step size, before bias, softplus and limits.
        A: (H,) decay rates, negative.
        B: (B, L, G, N) input matrix; head h belongs to group h // (H / G).
        C: (B, L, G, N) output matrix.
        D: (H,) or (H, P) skip connection; None is none.
        dt_bias: (H,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: least and greatest step size; a step beyond one of them is set to it and has no gradient.
        initial_state: (B, H, P, N) state before the first token; None is zero.
        segment_ids: (B, L) document of each token. A token whose id is not that of the token before starts from a zero
            state; the first one continues `initial_state` whatever its id.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The output y and the state after the last token.

    Raises:
        ValueError: a shape or dtype outside the above, limits that are not in order, or an unknown name.
        NotImplementedError: the named implementation declines the arguments.
        ExceptionGroup: all implementations for the platform decline them.

    Source: arXiv 2405.21060, section 6 and listing 1; the step size as in the authors' Mamba-2 layer.
    """
    arguments = SSDArguments.of(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        initial_state=initial_state,
        segment_ids=segment_ids,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )

    def run(part: SSDArguments) -> SSDOutput:
        return core.decaying_attention(core.as_decaying_attention(part), implementation=implementation)

    return on_own_part(run, arguments, SSDOutput)
