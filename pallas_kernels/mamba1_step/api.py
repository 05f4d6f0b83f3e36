"""One token of a whole residual block with a Mamba-1 mixer, for token-by-token generation."""

import jax

from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, Mamba1Weights, StepArguments

_HERE, _NAME = "pallas_kernels.mamba1_step", "mamba1_step"
_dispatch = Dispatcher[Mamba1StepOutput](
    op=_NAME,
    implementations={
        "triton": Backend(f"{_HERE}.triton.op", _NAME),
        "xla": Backend(f"{_HERE}.xla.op", _NAME),
    },
    platform_order={"gpu": ("triton", "xla")},
)
IMPLEMENTATIONS = tuple(_dispatch.implementations)


def mamba1_step(
    residual: jax.Array,
    window: jax.Array,
    state: jax.Array,
    weights: Mamba1Weights,
    *,
    eps: float,
    implementation: str | None = None,
) -> Mamba1StepOutput:
    """Advances a residual block with a Mamba-1 mixer by one token.

        u        = residual / sqrt(mean(residual^2) + eps) * norm_scale
        x, z     = u in_proj
        x        = silu(conv_bias + sum_k conv_weight_k [window, x]_k)
        dt, B, C = x x_proj
        dt       = softplus(dt dt_proj + dt_bias)
        state'   = exp(dt A) state + dt B x, A = -exp(A_log)
        y        = (C state' + D x) silu(z)
        residual' = residual + y out_proj

    Operands and results of the products are rounded to the compute dtype, everything else is computed in float32
    (float64 where the residual is), as the layers of a model do one by one. Integers of int8 matrices are exact in the
    compute dtype, and their sum is multiplied with the scales. A kernel may round before it divides by the root mean
    square, which is the same but for the last bit of an operand. For generation only: there is no gradient; 'triton'
    refuses to be differentiated. On a GPU the three results take the place of the first three arguments in memory if a
    caller gives these up, by donation or as the carry of a loop. Kernels read matrices by columns: they are fast where
    these lie in memory that way.

    Args:
        residual: (B, D) residual stream before the block.
        window: (B, K - 1, E) last inputs of the convolution, in the compute dtype.
        state: (B, E, N) recurrent state before the token, which keeps its dtype.
        weights: of the block.
        eps: of the norm.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The residual stream, the window and the state after the token.

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.
        ExceptionGroup: no implementation for the platform takes them.

    Source: arXiv 2312.00752, algorithm 2 and figure 3.
    """
    arguments = StepArguments.of(residual=residual, window=window, state=state, eps=eps, **vars(weights))
    arguments.check_projections()
    return _dispatch(arguments, implementation=implementation)
