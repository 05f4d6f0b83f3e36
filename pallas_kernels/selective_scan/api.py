"""The selective scan: the recurrence at the heart of Mamba."""

import functools
from typing import Any

from jax import Array

from pallas_kernels.common.array_types import ChannelE, MatrixEN, SegmentsBL, SequenceBLE, SequenceMatrix, StateBEN
from pallas_kernels.common.checks import as_arrays
from pallas_kernels.common.dispatch import Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.selective_scan import reference
from pallas_kernels.selective_scan.arguments import OP, Discretization, ScanOutput, check_arguments, dimensions
from pallas_kernels.selective_scan.pallas_gpu import op as pallas_gpu
from pallas_kernels.selective_scan.pallas_tpu import op as pallas_tpu
from pallas_kernels.selective_scan.triton import op as triton
from pallas_kernels.selective_scan.xla import op as xla

_dispatch = Dispatcher[ScanOutput](
    op=OP,
    implementations={
        "reference": reference.selective_scan,
        "pallas_gpu": pallas_gpu.selective_scan,
        "pallas_tpu": pallas_tpu.selective_scan,
        "triton": triton.selective_scan,
        "xla": functools.partial(xla.selective_scan, recurrence="by_platform"),
        "xla_sequential": functools.partial(xla.selective_scan, recurrence="sequential"),
        "xla_associative": functools.partial(xla.selective_scan, recurrence="associative"),
    },
    platform_order={"gpu": ("pallas_gpu", "triton", "xla"), "tpu": ("pallas_tpu", "xla")},
)
IMPLEMENTATIONS = tuple(_dispatch.implementations)


def selective_scan(
    x: SequenceBLE,
    dt: SequenceBLE,
    A: MatrixEN,
    B: SequenceMatrix,
    C: SequenceMatrix,
    *,
    D: ChannelE | None = None,
    z: SequenceBLE | None = None,
    dt_bias: ChannelE | None = None,
    dt_softplus: bool = False,
    discretization: Discretization = "euler",
    initial_state: StateBEN | None = None,
    segment_ids: SegmentsBL | None = None,
    implementation: str | None = None,
) -> ScanOutput:
    r"""Runs an input-dependent diagonal linear recurrence over a sequence.

    For every batch row, channel e and state n, with dt_t = softplus(dt_t + dt_bias) if `dt_softplus`:

        h_t = exp(dt_t A) h_{t-1} + Bbar_t x_t
        y_t = (sum_n C_t h_t + D x_t) silu(z_t)

    Bbar_t is dt_t B_t ("euler", as in the released Mamba code) or (exp(dt_t A) - 1) / A B_t ("zoh"). With a complex A,
    whose states stand for conjugate pairs, sum_n C_t h_t becomes 2 Re(sum_n C_t h_t).

    Differentiable in every floating argument, through both outputs: in reverse mode, and but for the kernels in forward
    mode. The state is float32 throughout. Under explicit mesh axes rows and channels stay split as those of x are.
    NumPy arrays and nested lists are taken as well.

    Args:
        x: (B, L, E) input.
        dt: (B, L, E) step size, before bias and softplus; after them it must not be negative.
        A: (E, N) decay rates, real part negative; a zero is not allowed with "zoh". Real or complex.
        B: input matrix: (B, L, N); (B, L, G, N), where channel e belongs to group e // (E / G); or (E, N), constant
            over time. Real, or complex if A is.
        C: output matrix, shaped like B or by itself any of the three.
        D: (E,) skip connection; None is none.
        z: (B, L, E) gate; None is none.
        dt_bias: (E,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        discretization: of B.
        initial_state: (B, E, N) state before the first token; None is zero.
        segment_ids: (B, L) document of each token. Where the id differs from that of the token before, the state is
            zero before the token. The first token continues `initial_state` whatever its id.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The output y and the state after the last token.

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.
        ExceptionGroup: no implementation for the platform takes them.

    Source: arXiv 2312.00752, algorithm 2 and equations 1-4; the gate is part of the block in its figure 3.
    """
    required = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    carried = {"initial_state": initial_state, "segment_ids": segment_ids}
    optional = {"D": D, "z": z, "dt_bias": dt_bias, **carried}
    arrays = as_arrays(OP, required, optional)
    check_arguments(arrays, discretization=discretization)
    options = {"dt_softplus": dt_softplus, "discretization": discretization, "implementation": implementation}

    def run(arrays: dict[str, Any]) -> tuple[Array, Array]:
        given = [arrays[name] for name in required]
        output = _dispatch(*given, **{name: arrays[name] for name in optional}, **options)
        return output.y, output.final_state

    y, final_state = on_own_part(run, arrays, dimensions(arrays), ("BLE", "BEN"))
    return ScanOutput(y=y, final_state=final_state)
