"""Calls of the state-space duality op that every implementation is tested with.

Lengths are 1, primes, and one less and one more than a chunk (64 and 128 tokens); between them the specifications cover
every argument present and absent, and heads that share B and C in every way.
"""

import dataclasses

import numpy as np

from pallas_kernels.common.arg_spec import Arguments, DType, segment_ids


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
        """Draws the arguments; step sizes around 0.3 and decay rates around 1 give decays all over (0, 1)."""
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
