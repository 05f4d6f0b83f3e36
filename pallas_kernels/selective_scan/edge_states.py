r"""What a run of tokens does to the states at its two edges, without outputs: cheaper than the scan itself.

Unrolled, the recurrence and its adjoint are sums over tokens. With s_jk the sum of the step sizes after token j, up to
and with token k, the tokens 1..L leave behind, from a zero state,

    h_L = sum_t exp(A s_tL) Bbar_t x_t

and the cotangents of y alone make the cotangent of the state that enters

    dh_0 = sum_t exp(A s_0t) C_t silu(z_t) dy_t

Tokens with a segment's start between them and the edge contribute nothing. A device that holds a part of a sequence
learns from these what it passes on to others, before it can start its own scan. The kernels have no derivatives.
"""

import jax
from jaxtyping import Inexact

from pallas_kernels.common.array_types import ChannelE, MatrixEN, SegmentsBL, SequenceBLE, SequenceMatrix
from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.selective_scan import api
from pallas_kernels.selective_scan.arguments import (
    Discretization,
    EdgeState,
    FinalStateArguments,
    InitialCotangentArguments,
)

_HERE = "pallas_kernels.selective_scan"
# So that one name chooses the scan and these: those of the scan that have no kernel for them.
_WITHOUT_KERNEL = frozenset(api.IMPLEMENTATIONS) - {"pallas_gpu", "pallas_tpu", "xla"}


def _dispatcher(op: str, function: str) -> Dispatcher[EdgeState]:
    """Chooses a backend for one of the two ops here; `function` is its name in the modules of the backends."""
    return Dispatcher(
        op=op,
        implementations={
            "pallas_gpu": Backend(f"{_HERE}.pallas_gpu.op", function),
            "pallas_tpu": Backend(f"{_HERE}.pallas_tpu.op", function),
            "xla": Backend(f"{_HERE}.xla.edge", function),
        },
        platform_order={"gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")},
    )


_dispatch_final_state = _dispatcher("selective_scan_final_state", "final_state")
_dispatch_initial_cotangent = _dispatcher("selective_scan_initial_cotangent", "initial_cotangent")


def selective_scan_final_state(
    x: SequenceBLE,
    dt: SequenceBLE,
    A: MatrixEN,
    B: SequenceMatrix,
    *,
    dt_bias: ChannelE | None = None,
    dt_softplus: bool = False,
    discretization: Discretization = "euler",
    segment_ids: SegmentsBL | None = None,
    implementation: str | None = None,
) -> Inexact[jax.Array, "B E N"]:
    """The `final_state` of `selective_scan` from a zero initial state.

    Args:
        x: (B, L, E) input.
        dt: (B, L, E) step size, before bias and softplus.
        A: (E, N) decay rates.
        B: (B, L, N), (B, L, G, N) or (E, N) input matrix.
        dt_bias: (E,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        discretization: how B is discretised, see `selective_scan`.
        segment_ids: (B, L) document of each token, or None.
        implementation: a name as for `selective_scan`; "xla" runs in place of those that have no kernel for this. None
            takes the platform's best that accepts the arguments.

    Returns:
        (B, E, N), float32 (complex64 for a complex A).

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.

    Source: arXiv 2312.00752, equation 2a unrolled.
    """
    arguments = FinalStateArguments.of(
        x=x,
        dt=dt,
        A=A,
        B=B,
        dt_bias=dt_bias,
        segment_ids=segment_ids,
        dt_softplus=dt_softplus,
        discretization=discretization,
    )
    run = _dispatch_final_state.using("xla" if implementation in _WITHOUT_KERNEL else implementation)
    return on_own_part(run, arguments, EdgeState).state


def selective_scan_initial_cotangent(
    dy: SequenceBLE,
    dt: SequenceBLE,
    A: MatrixEN,
    C: SequenceMatrix,
    *,
    z: SequenceBLE | None = None,
    dt_bias: ChannelE | None = None,
    dt_softplus: bool = False,
    segment_ids: SegmentsBL | None = None,
    implementation: str | None = None,
) -> Inexact[jax.Array, "B E N"]:
    """The gradient of a loss by the `initial_state` of `selective_scan`, if the loss depends on y only.

    Devices that hold parts of one sequence need it before the backward pass: each tells the part before it how the loss
    depends on the state that passes between them.

    Args:
        dy: (B, L, E) cotangent of y.
        dt: (B, L, E) step size, before bias and softplus.
        A: (E, N) decay rates.
        C: (B, L, N), (B, L, G, N) or (E, N) output matrix.
        z: (B, L, E) gate; None is none.
        dt_bias: (E,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        segment_ids: (B, L) document of each token, or None.
        implementation: a name as for `selective_scan`; "xla" runs in place of those that have no kernel for this. None
            takes the platform's best that accepts the arguments.

    Returns:
        (B, E, N), float32 (complex64 for a complex A).

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.

    Source: the adjoint of arXiv 2312.00752, equations 2a and 2b, unrolled.
    """
    arguments = InitialCotangentArguments.of(
        dy=dy, dt=dt, A=A, C=C, z=z, dt_bias=dt_bias, segment_ids=segment_ids, dt_softplus=dt_softplus
    )
    run = _dispatch_initial_cotangent.using("xla" if implementation in _WITHOUT_KERNEL else implementation)
    return on_own_part(run, arguments, EdgeState).state
