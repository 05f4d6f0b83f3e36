"""What kernels that multiply rows with a matrix are compiled for."""

import dataclasses
from typing import Any

import jax

# Rows of the smallest product of matrix units.
LEAST_ROWS = 16


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def taps_of_window(taps: int) -> int:
    """Inputs that a convolution remembers, all taps but one, as a power of two."""
    return next_power_of_two(max(taps - 1, 1))


def by_column(matrix: jax.Array) -> jax.Array:
    """A matrix (terms, *columns) as (columns, terms), which costs nothing if it lies in memory that way.

    Args:
        matrix: whose first dimension products sum over.
    """
    return matrix.reshape(matrix.shape[0], -1).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program of a product works on at a time; sizes are powers of two.

    Attributes:
        columns: of a program, at least 16 where the product is one of matrix units.
        depth: terms of the sum of a matrix of 2 bytes a weight, at least 32; of others as many bytes.
        stages: loads under way at a time.
        warps: of a program.
        parts: into which the sum is cut, one program each, to be added.
        rows: of a program at most, at least 16; a call of one row has programs of one.
    """

    columns: int
    depth: int
    stages: int
    warps: int
    parts: int = 1
    rows: int = LEAST_ROWS

    def constants(self, rows: int, matrix: jax.Array) -> dict[str, Any]:
        """What a kernel that works on such tiles is compiled for, but for its sizes.

        Args:
            rows: of the call.
            matrix: that it multiplies with.
        """
        return {
            "M": 1 if rows == 1 else max(LEAST_ROWS, min(self.rows, next_power_of_two(rows))),
            "COLUMNS": self.columns,
            "DEPTH": self.depth * 2 // matrix.dtype.itemsize,
            "STAGES": self.stages,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductConstants:
    """Of a kernel that multiplies rows with a matrix; all attributes in lower case follow.

    Attributes:
        ROWS: batch rows.
        M: rows of a program, a power of two. One row is multiplied without matrix units.
        COLUMNS: of a program, a power of two.
        DEPTH: terms of a sum that are loaded at a time, a power of two.
        STAGES: loads under way at a time.
        PARTS: into which the sum is cut, one program each; 1 is not at all.
    """

    ROWS: int
    M: int
    COLUMNS: int
    DEPTH: int
    STAGES: int
    PARTS: int = 1

    @property
    def row_blocks(self) -> int:
        """Programs of the same columns, which follow each other: they read the same weights."""
        return -(-self.ROWS // self.M)

    @property
    def IS_WINDOW_LATE(self) -> bool:
        """Whether a window is read after the sum: of many rows it would want the sum's registers."""
        return self.M > LEAST_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartsConstants(ProductConstants):
    """Of a product in parts of its sum.

    Attributes:
        TERMS: of the whole sum.
        CHANNELS: columns of the matrix.
    """

    TERMS: int
    CHANNELS: int

    @property
    def steps(self) -> int:
        """Loads of a part of the sum."""
        return -(-self.TERMS // (self.PARTS * self.DEPTH))

    @property
    def programs(self) -> int:
        """Of the whole product."""
        return -(-self.CHANNELS // self.COLUMNS) * self.row_blocks * self.PARTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConstants:
    """Of the kernel that normalises the residual stream, a row a program.

    Attributes:
        D: width of the residual stream.
        EPS: of the norm.
    """

    D: int
    EPS: float

    @property
    def WIDTH(self) -> int:
        """D as a power of two."""
        return next_power_of_two(self.D)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumConstants:
    """Of a kernel that adds the parts of a product; all attributes in lower case follow.

    Attributes:
        ROWS: batch rows.
        CHANNELS: columns of the product.
        COLUMNS: of a program, which has one row; a power of two.
        PARTS: of the product.
        IS_BFLOAT16: whether the product is rounded to bfloat16.
    """

    ROWS: int
    CHANNELS: int
    COLUMNS: int
    PARTS: int
    IS_BFLOAT16: bool

    @property
    def blocks(self) -> int:
        """Of the columns."""
        return -(-self.CHANNELS // self.COLUMNS)
