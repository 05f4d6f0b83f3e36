"""Calls of the causal convolution: what it is tested with, timed with, and judged by.

The tests have all widths in use, and every option.
"""

import dataclasses

import numpy as np

from pallas_kernels.causal_conv1d.arguments import Activation
from pallas_kernels.common.arg_spec import Arguments, DType, Manifest, Tolerance, Work, segment_ids


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

# What a Mamba block passes: bias and SiLU.
_BLOCK = ConvSpec(name="small", batch=2, length=1024, channels=512, has_initial_window=False)
MANIFEST = Manifest(
    sizes=("batch", "length", "channels", "width"),
    tested=SPECS,
    timed={
        "cpu": (_BLOCK, dataclasses.replace(_BLOCK, name="small_long", batch=1, length=8192, channels=256)),
        "accelerator": (
            dataclasses.replace(_BLOCK, name="mamba_130m", batch=8, length=2048, channels=1536),
            dataclasses.replace(_BLOCK, name="mamba_2_8b", batch=8, length=2048, channels=5120),
        ),
    },
    tolerance=Tolerance(
        longest_sum={"BL": 1, "K": 1},
        because="the gradients of weight and bias add over all tokens, outputs over taps",
    ),
    # Taps; then the bias, and v / (1 + exp(-v)).
    forward=Work(vector={"BLEK": 2, "BLE": 3}, special={"BLE": 2}),
    # Gradients of x and of the taps; then the SiLU's s (1 + v (1 - s)) times dy, and the bias's sum.
    backward=Work(vector={"BLEK": 4, "BLE": 6}),
)
