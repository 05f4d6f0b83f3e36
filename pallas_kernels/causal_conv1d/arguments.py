"""What every implementation of the causal convolution takes and returns."""

from typing import Literal

from pallas_kernels.common.arguments import Arguments, OpTable, arguments, array, option, result
from pallas_kernels.common.array_types import Leaf

Activation = Literal["silu"]


@arguments("causal_conv1d")
class ConvArguments(Arguments):
    """See `pallas_kernels.causal_conv1d.api.causal_conv1d`; W is K - 1."""

    derived = {"W": ("K", -1)}  # noqa: RUF012

    x: Leaf = array("BLE")
    weight: Leaf = array("KE")
    bias: Leaf | None = array("E", optional=True)
    initial_window: Leaf | None = array("BWE", optional=True)
    segment_ids: Leaf | None = array("BL", optional=True, dtype="integer")
    activation: Activation | None = option(None, choices=(None, "silu"))


@result
class ConvOutput:
    """Result of a causal convolution.

    Attributes:
        y: (B, L, E), dtype of x.
        final_window: (B, K - 1, E), dtype of x: the last K - 1 inputs, zero where they belong to an earlier segment
            than the last token.
    """

    y: Leaf = array("BLE")
    final_window: Leaf = array("BWE")


CONVOLUTION = OpTable(ConvArguments, ConvOutput)
