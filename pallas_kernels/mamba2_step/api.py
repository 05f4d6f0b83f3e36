"""One token of a whole residual block with a Mamba-2 mixer, for token-by-token generation."""

from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.mamba2_step.arguments import Mamba2Carry, Mamba2Weights, StepArguments
from pallas_kernels.ssd.arguments import UNLIMITED

_HERE, _NAME = "pallas_kernels.mamba2_step", "mamba2_step"
_dispatch = Dispatcher[Mamba2Carry](
    op=_NAME,
    platform_order={"gpu": ("triton", "xla")},
    implementations={
        "triton": Backend(f"{_HERE}.triton.op", _NAME),
        "xla": Backend(f"{_HERE}.xla.op", _NAME),
    },
)
IMPLEMENTATIONS = tuple(_dispatch.implementations)


def mamba2_step(
    before: Mamba2Carry,
    weights: Mamba2Weights,
    *,
    eps: float,
    gated_norm_eps: float,
    group_size: int,
    dt_limit: tuple[float, float] = UNLIMITED,
    implementation: str | None = None,
) -> Mamba2Carry:
    """Advances a residual block with a Mamba-2 mixer by one token.

        u         = residual / sqrt(mean(residual^2) + eps) * norm_scale
        z, x      = u in_proj;   B, C = u BC_proj;   dt = u dt_proj
        x, B, C   = silu(bias + sum_k weight_k [window, (x, B, C)]_k)
        dt        = softplus(dt + dt_bias), within dt_limit
        state'    = exp(dt A) state + dt x B^T, for every head, A = -exp(A_log)
        y         = (state' C + D x) silu(z)
        y         = y / sqrt(mean(y^2) + gated_norm_eps) * gated_norm_scale, means over groups of channels
        residual' = residual + y out_proj

    Operands and results of the products, and the recurrence's output before its gate, are rounded to the compute dtype,
    everything else is computed in float32 (float64 where the residual is), as the layers of a model do one by one.
    Integers of int8 matrices are exact in the compute dtype, and their sum is multiplied with the scales. A kernel may
    round before it divides by a root mean square, which is the same but for the last bit of an operand. For generation
    only: there is no gradient. On a GPU the results take the place of `before` in memory if the caller gives it up, by
    donation or as the carry of a loop. Kernels read matrices by columns: they are fast where these lie in memory that
    way.

    With a ring the state is read for every token and written for every L-th only: the inputs of the tokens since are
    kept, and what they add to the output is computed from them. It is the same recurrence, added up in another order:

        y = exp(s_n) state C + sum_j exp(s_n - s_j) dt_j (B_j C) x_j + D x,   s_j = A sum_{i <= j} dt_i

    Args:
        before: the residual stream before the block, and the windows, the state and the ring before the token.
        weights: of the block.
        eps: of the norm before the mixer.
        gated_norm_eps: of the norm of what the gate gates.
        group_size: channels that this norm takes together; divides E.
        dt_limit: least and greatest step size.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The residual stream, the windows, the state and the ring after the token.

    Raises:
        ValueError: only part of a ring, a shape or dtype outside the above, limits that are not in order, or an unknown
            name.
        NotImplementedError: the named implementation does not take the arguments.
        ExceptionGroup: no implementation for the platform takes them.

    Source: arXiv 2405.21060, section 7.1 and figure 6.
    """
    arguments = StepArguments.of(
        **vars(before),
        **vars(weights),
        eps=eps,
        gated_norm_eps=gated_norm_eps,
        group_size=group_size,
        dt_limit=dt_limit,
    )
    arguments.check_projections()
    return _dispatch(arguments, implementation=implementation)
