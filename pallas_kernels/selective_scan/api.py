"""The selective scan: the recurrence at the heart of Mamba."""

from pallas_kernels.common.array_types import ChannelE, MatrixEN, SegmentsBL, SequenceBLE, SequenceMatrix, StateBEN
from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.common.partitioning import on_own_part
from pallas_kernels.selective_scan.arguments import Discretization, ScanArguments, ScanOutput

_HERE, _NAME = "pallas_kernels.selective_scan", "selective_scan"
_dispatch = Dispatcher[ScanOutput](
    op=_NAME,
    implementations={
        "reference": Backend(f"{_HERE}.reference", _NAME),
        "pallas_gpu": Backend(f"{_HERE}.pallas_gpu.op", _NAME),
        "pallas_tpu": Backend(f"{_HERE}.pallas_tpu.op", _NAME),
        "triton": Backend(f"{_HERE}.triton.op", _NAME),
        "xla": Backend(f"{_HERE}.xla.op", _NAME, {"recurrence": "by_platform"}),
        "xla_sequential": Backend(f"{_HERE}.xla.op", _NAME, {"recurrence": "sequential"}),
        "xla_associative": Backend(f"{_HERE}.xla.op", _NAME, {"recurrence": "associative"}),
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
        C: output matrix, in any of the three shapes of B; it need not have the same one.
        D: (E,) skip connection; None is none.
        z: (B, L, E) gate; None is none.
        dt_bias: (E,) added to dt; None is none.
        dt_softplus: apply softplus to dt + dt_bias.
        discretization: how B is discretised: "euler" is dt B, "zoh" the exact zero-order hold, (exp(dt A) - 1) / A B.
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
    arguments = ScanArguments.of(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        segment_ids=segment_ids,
        dt_softplus=dt_softplus,
        discretization=discretization,
    )
    return on_own_part(_dispatch.using(implementation), arguments, ScanOutput)
