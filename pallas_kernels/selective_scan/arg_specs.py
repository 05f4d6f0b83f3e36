"""Calls of the selective scan: what it is tested with, timed with, and judged by.

Lengths of the tests are 1, primes, and one less and one more than a chunk (16 and 64 tokens); between them they cover
every argument present and absent, in every layout. The last one is the official test suite's case.
"""

import dataclasses
from typing import Literal

import numpy as np

from pallas_kernels.common.arg_spec import Arguments, DType, Manifest, Tolerance, Work, segment_ids
from pallas_kernels.selective_scan.arguments import Discretization

Layout = Literal["shared", "grouped", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanSpec:
    """Sizes and options of one call; a layout says how the channels share B or C."""

    name: str
    length: int
    batch: int = 2
    channels: int = 6
    states: int = 4
    groups: int = 2
    B: Layout = "shared"
    C: Layout = "shared"
    dtype: DType = "float32"
    is_complex: bool = False
    has_complex_matrices: bool = False
    has_skip: bool = True
    has_gate: bool = True
    has_bias: bool = True
    has_softplus: bool = True
    has_initial_state: bool = True
    has_segments: bool = False
    discretization: Discretization = "euler"

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments in double precision: `narrow` ones are rounded to the dtype under test, `wide` not.

        Step sizes around 0.3 and decay rates around 1 give decays all over (0, 1).
        """
        rng = np.random.default_rng(seed)
        sequence = (self.batch, self.length, self.channels)
        per_state = (self.channels, self.states)
        narrow = {"x": rng.standard_normal(sequence), "dt": rng.standard_normal(sequence) - 1}
        if not self.has_softplus:
            narrow["dt"] = np.logaddexp(narrow["dt"], 0)
        if self.has_gate:
            narrow["z"] = rng.standard_normal(sequence)
        wide = {"A": -np.exp(0.5 * rng.standard_normal(per_state))}
        if self.is_complex:
            wide["A"] = wide["A"] + 3j * rng.standard_normal(per_state)
        if self.has_skip:
            wide["D"] = rng.standard_normal(self.channels)
        if self.has_bias:
            wide["dt_bias"] = 0.3 * rng.standard_normal(self.channels)
        if self.has_initial_state:
            wide["initial_state"] = self._matrix(rng, (self.batch, *per_state))
        for name, layout in (("B", self.B), ("C", self.C)):
            shape = {
                "shared": (self.batch, self.length, self.states),
                "grouped": (self.batch, self.length, self.groups, self.states),
                "constant": per_state,
            }[layout]
            # Constant matrices are parameters, as A is, and complex ones have no dtype of 16 bits.
            is_narrow = layout != "constant" and not self.has_complex_matrices
            (narrow if is_narrow else wide)[name] = self._matrix(rng, shape)
        integers = {}
        if self.has_segments:
            integers["segment_ids"] = segment_ids(rng, batch=self.batch, length=self.length)
        static = {"dt_softplus": self.has_softplus, "discretization": self.discretization}
        return Arguments(wide=wide, narrow=narrow, integers=integers, static=static)

    def _matrix(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        matrix = rng.standard_normal(shape)
        return matrix + 1j * rng.standard_normal(shape) if self.has_complex_matrices else matrix


FULL = ScanSpec(name="full", length=67, has_segments=True)
SPECS = (
    FULL,
    dataclasses.replace(FULL, name="bfloat16", dtype="bfloat16"),
    ScanSpec(
        name="bare",
        length=17,
        has_skip=False,
        has_gate=False,
        has_bias=False,
        has_softplus=False,
        has_initial_state=False,
    ),
    ScanSpec(name="one_token", length=1, B="grouped", discretization="zoh", has_segments=True),
    ScanSpec(name="grouped_zoh", length=63, B="grouped", C="grouped", discretization="zoh", has_segments=True),
    ScanSpec(name="constant", length=65, B="constant", C="constant", has_bias=False, has_gate=False),
    ScanSpec(name="mixed", length=15, B="constant", C="grouped", states=1, discretization="zoh", has_softplus=False),
    ScanSpec(
        name="complex",
        length=37,
        B="grouped",
        C="grouped",
        is_complex=True,
        has_complex_matrices=True,
        discretization="zoh",
        has_segments=True,
    ),
    ScanSpec(name="complex_constant", length=16, C="constant", is_complex=True, has_skip=False),
    ScanSpec(name="official", length=128, channels=4, states=8, B="grouped", C="grouped", has_initial_state=False),
)

# What a Mamba block passes in training: D, gate, bias and softplus.
_BLOCK = ScanSpec(name="small", batch=2, length=1024, channels=512, states=16, has_initial_state=False)
_LARGE = dataclasses.replace(_BLOCK, name="mamba_130m", batch=8, length=2048, channels=1536)
MANIFEST = Manifest(
    sizes=("batch", "length", "channels", "states"),
    tested=SPECS,
    timed={
        "cpu": (
            _BLOCK,
            dataclasses.replace(_BLOCK, name="small_long", batch=1, length=8192, channels=256),
            dataclasses.replace(_BLOCK, name="small_many_states", batch=8, length=256, states=64),
        ),
        "accelerator": (
            _LARGE,
            dataclasses.replace(_LARGE, name="mamba_2_8b", channels=5120),
            dataclasses.replace(_LARGE, name="one_row", batch=1, channels=2048),
            dataclasses.replace(_LARGE, name="long", batch=1, length=131072, channels=2048),
            dataclasses.replace(_LARGE, name="many_short", batch=64, length=512),
        ),
    },
    tolerance=Tolerance(
        longest_sum={"BL": 1, "E": 1, "N": 1},
        because="the gradients of A, D and dt_bias add over all tokens, those of B and C over channels, outputs over "
        "states",
    ),
    # Of README.md's equations, for a state: (2) 1 and the exponential, (3) 1, (4) 2, (5) 2. For a channel: (1) 4 and an
    # exponential and a logarithm, (3) 1, (5) 2, (6) 3 and an exponential and a reciprocal.
    forward=Work(vector={"BLEN": 6, "BLE": 10}, special={"BLEN": 1, "BLE": 4}),
    # For a state: (10) 2, (11) 1, (12) 1, (13) 2, (14) 4, (15) 2, (17) 2. For a channel: (8) 1, (9) 6, (16) 3, (17) 2,
    # (18) 2, (19) 2.
    backward=Work(vector={"BLEN": 14, "BLE": 16}),
)
