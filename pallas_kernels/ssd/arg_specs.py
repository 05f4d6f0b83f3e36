"""Calls of the state-space duality op that every implementation is tested and timed with, and how it is judged.

Lengths are 1, primes, and one less and one more than a chunk (64 and 128 tokens); between them the specifications cover
every argument present and absent, and heads that share B and C in every way.
"""

import dataclasses

import numpy as np

from pallas_kernels.common.arg_spec import Arguments, DType, Manifest, Tolerance, Work, segment_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSDSpec:
    """Sizes and options of one call.

    Attributes:
        has_skip: D for each head, for each channel, or not at all.
    """

    name: str
    length: int
    batch: int = 2
    heads: int = 4
    width: int = 8
    states: int = 6
    groups: int = 2
    dtype: DType = "float32"
    has_skip: bool | str = True
    has_bias: bool = True
    has_softplus: bool = True
    has_initial_state: bool = True
    has_segments: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments in double precision: `narrow` ones are rounded to the dtype under test, `wide` not.

        Step sizes around 0.3 and decay rates around 1 give decays all over (0, 1).
        """
        rng = np.random.default_rng(seed)
        tokens = (self.batch, self.length)
        matrix = (*tokens, self.groups, self.states)
        narrow = {"x": rng.standard_normal((*tokens, self.heads, self.width))}
        narrow["dt"] = rng.standard_normal((*tokens, self.heads)) - 1
        if not self.has_softplus:
            narrow["dt"] = np.logaddexp(narrow["dt"], 0)
        narrow |= {"B": rng.standard_normal(matrix), "C": rng.standard_normal(matrix)}
        wide = {"A": -np.exp(0.5 * rng.standard_normal(self.heads))}
        if self.has_skip:
            shape = (self.heads, self.width) if self.has_skip == "by channel" else (self.heads,)
            wide["D"] = rng.standard_normal(shape)
        if self.has_bias:
            wide["dt_bias"] = 0.3 * rng.standard_normal(self.heads)
        if self.has_initial_state:
            wide["initial_state"] = rng.standard_normal((self.batch, self.heads, self.width, self.states))
        integers = {}
        if self.has_segments:
            integers["segment_ids"] = segment_ids(rng, batch=self.batch, length=self.length)
        static = {"dt_softplus": self.has_softplus, "dt_limit": self.dt_limit}
        return Arguments(wide=wide, narrow=narrow, integers=integers, static=static)


FULL = SSDSpec(name="full", length=131, has_segments=True)
SPECS = (
    FULL,
    dataclasses.replace(FULL, name="bfloat16", dtype="bfloat16"),
    SSDSpec(
        name="bare",
        length=17,
        groups=1,
        has_skip=False,
        has_bias=False,
        has_softplus=False,
        has_initial_state=False,
    ),
    SSDSpec(name="one_token", length=1, has_segments=True),
    SSDSpec(name="group_of_each_head", length=63, groups=4, has_skip="by channel", has_segments=True),
    SSDSpec(name="one_group", length=129, groups=1, has_bias=False, has_initial_state=False),
    SSDSpec(name="limited", length=65, dt_limit=(0.2, 0.5), has_skip="by channel"),
    SSDSpec(name="one_head", length=37, batch=1, heads=1, groups=1, width=3, states=1, has_segments=True),
    SSDSpec(name="official", length=128, heads=2, width=64, states=128, groups=1, has_initial_state=False),
    SSDSpec(name="official_bfloat16", length=128, heads=2, width=64, states=128, groups=1, dtype="bfloat16"),
)
_BLOCK = SSDSpec(name="small", length=1024, heads=8, width=64, states=64, groups=1, has_initial_state=False)
_LARGE = dataclasses.replace(_BLOCK, name="mamba2_130m", batch=8, length=2048, heads=24, states=128)
MANIFEST = Manifest(
    sizes=("batch", "length", "heads", "width", "states"),
    tested=SPECS,
    timed={
        "cpu": (_BLOCK,),
        "accelerator": (
            _LARGE,
            dataclasses.replace(_LARGE, name="mamba2_2_7b", heads=80),
            dataclasses.replace(_LARGE, name="one_row", batch=1, length=16384, heads=80),
            dataclasses.replace(_LARGE, name="long", batch=1, length=131072),
        ),
    },
    tolerance=Tolerance(
        longest_sum={"BL": 1, "H": 1, "P": 1, "N": 1},
        because="the gradients of A, D and dt_bias add over all tokens, after channels and states; those of B and C "
        "over heads and channels, outputs over states",
    ),
    # Of README.md's equations, (3) and (4) as products; besides, for a head: (1) 4, an exponential and a logarithm, (2)
    # 1, and the exponential of the decay; for a channel: (3) 1, (4) 2.
    forward=Work(matrix={"BLHPN": 4}, vector={"BLHP": 3, "BLH": 5}, special={"BLH": 3}),
    # (5), both of (8), and r of (9) as products; besides, for a channel: (9) 5, (10) 2; for a head: (1) 2, (2) 4.
    backward=Work(matrix={"BLHPN": 8}, vector={"BLHP": 7, "BLH": 6}),
)
