"""Short causal convolution of every channel with its own filter."""

from pallas_kernels.causal_conv1d.arguments import Activation, ConvArguments, ConvOutput
from pallas_kernels.common.array_types import ChannelE, SegmentsBL, SequenceBLE, WeightKE, WindowBKE
from pallas_kernels.common.dispatch import Backend, Dispatcher
from pallas_kernels.common.partitioning import on_own_part

_HERE, _NAME = "pallas_kernels.causal_conv1d", "causal_conv1d"
_dispatch = Dispatcher[ConvOutput](
    op=_NAME,
    implementations={
        "reference": Backend(f"{_HERE}.reference", _NAME),
        "xla": Backend(f"{_HERE}.xla.op", _NAME),
        "pallas_gpu": Backend(f"{_HERE}.pallas_gpu.op", _NAME),
        "pallas_tpu": Backend(f"{_HERE}.pallas_tpu.op", _NAME),
    },
    platform_order={"gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla")},
)
IMPLEMENTATIONS = tuple(_dispatch.implementations)


def causal_conv1d(
    x: SequenceBLE,
    weight: WeightKE,
    bias: ChannelE | None = None,
    *,
    activation: Activation | None = None,
    initial_window: WindowBKE | None = None,
    segment_ids: SegmentsBL | None = None,
    implementation: str | None = None,
) -> ConvOutput:
    """Convolves each channel with its own K taps over the current token and the K - 1 before it.

        y_t = activation(bias + sum_k weight_k x_{t - (K - 1) + k})

    Inputs of another segment than that of token t count as zero. Sums are float32. Differentiable in every floating
    argument, through both outputs: in reverse mode, and but for the kernels in forward mode. Under explicit mesh axes
    rows and channels stay split as those of x are. NumPy arrays and nested lists are taken as well.

    Args:
        x: (B, L, E) input.
        weight: (K, E) taps; weight[K - 1] multiplies the current token.
        bias: (E,); None is zero.
        activation: "silu" or None for the identity.
        initial_window: (B, K - 1, E) the inputs before the first token, oldest first, rounded to the dtype of x; they
            belong to the first token's segment. None is zero.
        segment_ids: (B, L) document of each token; a segment starts where the id differs from that of the token before.
        implementation: a name runs or raises; None takes the platform's best that accepts the arguments.

    Returns:
        The output y and the window that continues the sequence.

    Raises:
        ValueError: a shape or dtype outside the above, or an unknown name.
        NotImplementedError: the named implementation does not take the arguments.
        ExceptionGroup: no implementation for the platform takes them.

    Source: arXiv 2312.00752, figure 3.
    """
    arguments = ConvArguments.of(
        x=x,
        weight=weight,
        bias=bias,
        initial_window=initial_window,
        segment_ids=segment_ids,
        activation=activation,
    )
    return on_own_part(_dispatch.using(implementation), arguments, ConvOutput)
