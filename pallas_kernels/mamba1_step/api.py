"""One token of a whole residual block with a Mamba-1 mixer, for token-by-token generation."""

import jax

from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.mamba1_step.arguments import Mamba1StepOutput, Mamba1Weights, StepArguments

_HERE, _NAME = "pallas_kernels.mamba1_step", "mamba1_step"
_dispatch = Dispatcher[Mamba1StepOutput](
    op=_NAME,
    implementations={
        "triton": Backend(f"{_HERE}.triton.op", _NAME),
        "triton_columns": Backend(f"{_HERE}.triton.op", f"{_NAME}_by_columns"),
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

    Operands and results of the products are rounded to the dtype of `in_proj`, everything else is computed in float32
    (float64 where the residual is), as the layers of a model do one by one. A kernel may round before it divides by the
    root mean square, which is the same but for the last bit of an operand. For generation only: there is no gradient;
    'triton' refuses to be differentiated. On a GPU the three results take the place of the first three arguments in
    memory if the caller gives these up, by donation or as the carry of a loop.

    Args:
        residual: (B, D) residual stream before the block.
        window: (B, K - 1, E) last inputs of the convolution, in the dtype of `in_proj`.
        state: (B, E, N) recurrent state before the token, which keeps its dtype.
        weights: of the block.
        eps: of the norm.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.
            "triton_columns" is for matrices that lie in memory by columns, and has not run on a GPU yet.

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


def pays(rows: int, width: int) -> bool:
    """Whether kernels take less time than a block's layers do one by one under XLA, as measured on an H100.

    Few rows of a narrow model are a matter of launches, of which there are four instead of a dozen. The matrices of
    wider models, and products of more rows, XLA's own products read faster.

    Args:
        rows: B.
        width: D, of the residual stream.
    """
    return (width < 2048 and rows <= 16) or (width < 2560 and rows <= 2)
