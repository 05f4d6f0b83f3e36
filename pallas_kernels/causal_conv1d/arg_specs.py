"""Calls of the causal convolution that every implementation is tested with: all widths in use, every option."""

import dataclasses

import numpy as np

from pallas_kernels.causal_conv1d.arguments import Activation
from pallas_kernels.common.arg_spec import Arguments, DType, segment_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """Sizes and options of one call."""

    name: str
    length: int
    width: int = 4
    batch: int = 2
    channels: int = 6
    dtype: DType = "float32"
    has_bias: bool = True
    activation: Activation | None = "silu"
    has_initial_window: bool = True
    has_segments: bool = False

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments."""
        rng = np.random.default_rng(seed)
        narrow = {"x": rng.standard_normal((self.batch, self.length, self.channels))}
        wide = {"weight": rng.standard_normal((self.width, self.channels))}
        if self.has_bias:
            wide["bias"] = rng.standard_normal(self.channels)
        if self.has_initial_window:
            narrow["initial_window"] = rng.standard_normal((self.batch, self.width - 1, self.channels))
        integers = {}
        if self.has_segments:
            integers["segment_ids"] = segment_ids(rng, batch=self.batch, length=self.length)
        return Arguments(wide=wide, narrow=narrow, integers=integers, static={"activation": self.activation})


FULL = ConvSpec(name="full", length=67, has_segments=True)
SPECS = (
    FULL,
    dataclasses.replace(FULL, name="bfloat16", dtype="bfloat16"),
    ConvSpec(name="width_1", length=5, width=1),
    ConvSpec(name="width_2", length=33, width=2, has_bias=False, has_initial_window=False),
    ConvSpec(name="width_3", length=17, width=3, activation=None, has_segments=True),
    ConvSpec(name="width_7", length=31, width=7, has_segments=True),
    ConvSpec(name="one_token", length=1, has_segments=True),
    ConvSpec(name="shorter_than_window", length=2, width=4),
)
