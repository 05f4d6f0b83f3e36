"""What the Triton kernels of the Mamba-1 step are compiled for."""

import dataclasses

from pallas_kernels.common.triton.tiles import ProductConstants, next_power_of_two, taps_of_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a call.

    Attributes:
        ROWS: batch rows.
        D: width of the residual stream.
        E: inner channels.
        N: states of a channel.
        R: rank of the step size.
        K: taps of the convolution.
    """

    ROWS: int
    D: int
    E: int
    N: int
    R: int
    K: int

    @property
    def selection(self) -> int:
        """Columns of the x-projection: what dt is projected from, B and C."""
        return self.R + 2 * self.N


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionConstants(Sizes, ProductConstants):
    """Of a kernel that multiplies rows with a matrix; all attributes in lower case follow.

    Attributes:
        EPS: of the norm; read by the in-projection only.
    """

    EPS: float = 0.0

    @property
    def blocks(self) -> int:
        """Of the E channels."""
        return -(-self.E // self.COLUMNS)

    @property
    def steps(self) -> int:
        """Loads of the sum over E."""
        return -(-self.E // self.DEPTH)

    @property
    def ranks(self) -> int:
        """Loads of the sum over R."""
        return -(-self.R // self.DEPTH)

    @property
    def TAPS(self) -> int:
        """K - 1 taps of the window as a power of two."""
        return taps_of_window(self.K)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConstants(Sizes):
    """Of the kernel that advances the recurrence.

    Attributes:
        M: rows of a program: 1, or with HAS_DT any power of two.
        CHANNELS: of a program, a power of two from 16 on.
        RANK: of the R terms of dt that are loaded at a time, a power of two from 16 on.
        PARTS: that the x-projection comes in, to be added.
        HAS_DT: whether the projected step size (ROWS, E) comes in the place of its projection.
    """

    M: int
    CHANNELS: int
    RANK: int
    PARTS: int
    HAS_DT: bool

    @property
    def blocks(self) -> int:
        """Of the E channels."""
        return -(-self.E // self.CHANNELS)

    @property
    def P(self) -> int:
        """PARTS as a power of two."""
        return next_power_of_two(self.PARTS)

    @property
    def STATES(self) -> int:
        """N as a power of two."""
        return next_power_of_two(self.N)

    @property
    def ranks(self) -> int:
        """Loads of the R terms of dt."""
        return -(-self.R // self.RANK)
