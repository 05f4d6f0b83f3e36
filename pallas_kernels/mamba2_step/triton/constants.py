"""What the Triton kernels of the Mamba-2 step are compiled for."""

import dataclasses

from pallas_kernels.common.triton.tiles import ProductConstants, next_power_of_two, taps_of_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a call; all attributes in lower case follow.

    Attributes:
        ROWS: batch rows.
        D: width of the residual stream.
        H: heads.
        P: channels of a head.
        N: states of a channel.
        G: groups of heads that share B and C.
        K: taps of the convolutions.
        GROUP: channels that the gated norm takes together, whole heads.
    """

    ROWS: int
    D: int
    H: int
    P: int
    N: int
    G: int
    K: int
    GROUP: int

    @property
    def E(self) -> int:
        """Inner channels."""
        return self.H * self.P

    @property
    def BC(self) -> int:
        """Channels of B and C."""
        return 2 * self.G * self.N


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionConstants(Sizes, ProductConstants):
    """Of a kernel that multiplies rows with a matrix; all attributes in lower case follow.

    Attributes:
        EPS: of the norm.
        SQUARES: sums of squares that come for each row; read by the out-projection only.
    """

    EPS: float
    SQUARES: int = 0

    @property
    def blocks(self) -> int:
        """Of the E channels of z, or of x."""
        return -(-self.E // self.COLUMNS)

    @property
    def BC_blocks(self) -> int:
        """Of the channels of B and C."""
        return -(-self.BC // self.COLUMNS)

    @property
    def dt_blocks(self) -> int:
        """Of the heads."""
        return -(-self.H // self.COLUMNS)

    @property
    def programs(self) -> int:
        """Of the in-projections."""
        return (2 * self.blocks + self.BC_blocks + self.dt_blocks) * self.row_blocks

    @property
    def TAPS(self) -> int:
        """K - 1 taps of the windows as a power of two."""
        return taps_of_window(self.K)

    @property
    def groups(self) -> int:
        """Of channels that the gated norm takes together."""
        return self.E // self.GROUP

    @property
    def steps(self) -> int:
        """Loads of a part of the sum over a group."""
        return -(-self.GROUP // (self.PARTS * self.DEPTH))

    @property
    def squares(self) -> int:
        """Sums of squares of a group."""
        return self.SQUARES // self.groups

    @property
    def U(self) -> int:
        """Sums of squares of a group as a power of two."""
        return next_power_of_two(self.squares)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConstants(Sizes):
    """Of a kernel that advances the recurrence; all attributes in lower case follow.

    Attributes:
        CHANNELS: of a head and program, a power of two.
        DT_LEAST: least step size.
        DT_GREATEST: greatest step size.
        SKIPS: numbers of D for a head: 1 or P.
        LENGTH: tokens that the ring holds; 0 without one.
    """

    CHANNELS: int
    DT_LEAST: float
    DT_GREATEST: float
    SKIPS: int
    LENGTH: int

    @property
    def J(self) -> int:
        """LENGTH as a power of two, at least 16."""
        return max(next_power_of_two(self.LENGTH), 16)

    @property
    def pieces(self) -> int:
        """Programs of a head."""
        return -(-self.P // self.CHANNELS)

    @property
    def STATES(self) -> int:
        """N as a power of two."""
        return next_power_of_two(self.N)
