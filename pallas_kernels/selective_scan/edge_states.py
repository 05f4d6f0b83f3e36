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
from pallas_kernels.common.checks import as_arrays
from pallas_kernels.common.dispatch import Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.selective_scan import api
from pallas_kernels.selective_scan.arguments import Discretization, check_arguments, dimensions
from pallas_kernels.selective_scan.pallas_gpu import op as pallas_gpu
from pallas_kernels.selective_scan.pallas_tpu import op as pallas_tpu
from pallas_kernels.selective_scan.xla import edge as edge_states_xla

_dispatch = Dispatcher[jax.Array](
    op="selective_scan_edge",
    implementations={
        "pallas_gpu": pallas_gpu.edge_state,
        "pallas_tpu": pallas_tpu.edge_state,
        "xla": edge_states_xla.edge_state,
    },
    platform_order={"gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")},
)
# So that one name chooses the scan and this: those of the scan that have no kernel for it.
_WITHOUT_KERNEL = frozenset(api.IMPLEMENTATIONS) - _dispatch.implementations.keys()


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
        discretization: of B.
        segment_ids: (B, L) document of each token, or None.
        implementation: of `selective_scan`; those without a kernel for this take the one of XLA. None takes the
            platform's best that accepts the arguments.

    Returns:
        (B, E, N), float32 (complex64 for a complex A).

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.

    Source: arXiv 2312.00752, equation 2a unrolled.
    """
    required = {"x": x, "dt": dt, "A": A, "B": B}
    op = "selective_scan_final_state"
    arrays = as_arrays(op, required, {"dt_bias": dt_bias, "segment_ids": segment_ids})
    check_arguments(arrays, op=op, discretization=discretization)
    return _edge_state(
        arrays | {"C": arrays["B"]},
        implementation,
        dt_softplus=dt_softplus,
        discretization=discretization,
        backwards=False,
    )


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
    """The cotangent of the `initial_state` of `selective_scan`, where that of `final_state` is zero.

    Args:
        dy: (B, L, E) cotangent of y.
        dt: (B, L, E) step size, before bias and softplus.
        A: (E, N) decay rates.
        C: (B, L, N), (B, L, G, N) or (E, N) output matrix.
        z: (B, L, E) gate; None is none.
        dt_bias: (E,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        segment_ids: (B, L) document of each token, or None.
        implementation: of `selective_scan`; those without a kernel for this take the one of XLA. None takes the
            platform's best that accepts the arguments.

    Returns:
        (B, E, N), float32 (complex64 for a complex A).

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.

    Source: the adjoint of arXiv 2312.00752, equations 2a and 2b, unrolled.
    """
    required = {"dy": dy, "dt": dt, "A": A, "C": C}
    op = "selective_scan_initial_cotangent"
    arrays = as_arrays(op, required, {"z": z, "dt_bias": dt_bias, "segment_ids": segment_ids})
    # The discretization has no part in the decay.
    check_arguments(arrays, op=op, sequence="dy", discretization="euler")
    arrays["x"] = arrays.pop("dy")
    return _edge_state(
        arrays | {"B": arrays["C"]},
        implementation,
        dt_softplus=dt_softplus,
        discretization="euler",
        backwards=True,
    )


def _edge_state(
    arrays: dict[str, jax.Array | None],
    implementation: str | None,
    *,
    dt_softplus: bool,
    discretization: Discretization,
    backwards: bool,
) -> jax.Array:
    """Either of the two; backwards "x" is dy. The one matrix stands for both that a scan has."""

    def run(arrays: dict[str, jax.Array | None]) -> tuple[jax.Array]:
        state = _dispatch(
            {name: array for name, array in arrays.items() if array is not None and name != "segment_ids"},
            arrays["segment_ids"],
            dt_softplus=dt_softplus,
            discretization=discretization,
            backwards=backwards,
            implementation="xla" if implementation in _WITHOUT_KERNEL else implementation,
        )
        return (state,)

    (state,) = on_own_part(run, arrays, dimensions(arrays), ("BEN",))
    return state
