"""What kernels that multiply a few rows with a matrix are compiled for."""

import dataclasses
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.common.xla.token import product

# Rows that the kernels which stream a matrix take: the least that matrix units multiply. More rows are left to XLA's
# products, which have an arithmetic intensity worth their tiles.
MOST_ROWS = 16


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


def product_by_column(x: jax.Array, matrix: jax.Array, scale: jax.Array | None) -> jax.Array:
    """X (B, terms) times a matrix (terms, *columns) that lies by columns, by XLA: (B, columns).

    Without the constraint XLA would bring such matrices into another order first, all of them before a loop.

    Args:
        x: in the compute dtype, as the result.
        matrix: likewise, or int8.
        scale: (*columns), of a matrix in int8.
    """
    matrix = with_layout_constraint(matrix, Layout((*range(1, matrix.ndim), 0)))
    return product(x, matrix.reshape(matrix.shape[0], -1), None if scale is None else scale.reshape(-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program of a product works on at a time; sizes are powers of two.

    Attributes:
        columns: of a program, at least 16 where the product is one of matrix units.
        depth: terms of the sum of a matrix of 2 bytes a weight, at least 32; of others as many bytes.
        stages: loads under way at a time.
        warps: of a program.
        parts: into which the sum is cut.
    """

    columns: int
    depth: int
    stages: int
    warps: int
    parts: int = 1

    def constants(self, rows: int, matrix: jax.Array) -> dict[str, Any]:
        """What a kernel that works on such tiles is compiled for, but for its sizes.

        Args:
            rows: of the call.
            matrix: that it multiplies with.
        """
        return {
            "M": 1 if rows == 1 else MOST_ROWS,
            "COLUMNS": self.columns,
            "DEPTH": self.depth * 2 // matrix.dtype.itemsize,
            "STAGES": self.stages,
        }


# Of a convolution alone, where the rows are many: columns and warps count, and depth is its rows.
CONVOLUTION_TILE = Tile(columns=128, depth=8, stages=1, warps=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductConstants:
    """Of a kernel that multiplies a few rows with a matrix.

    Attributes:
        ROWS: batch rows.
        M: rows of a tile, a power of two. One row is multiplied without matrix units.
        COLUMNS: of a program, a power of two.
        DEPTH: terms of a sum that are loaded at a time, a power of two.
        STAGES: loads under way at a time.
    """

    ROWS: int
    M: int
    COLUMNS: int
    DEPTH: int
    STAGES: int


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
class ConvolutionConstants:
    """Of the kernel that convolves alone; all attributes in lower case follow.

    Attributes:
        ROWS: batch rows.
        M: rows of a program, a power of two.
        COLUMNS: of a program, a power of two.
        E: channels.
        K: taps.
        STRIDE: from a row of the inputs to the next.
        OFFSET: of their first channel.
    """

    ROWS: int
    M: int
    COLUMNS: int
    E: int
    K: int
    STRIDE: int
    OFFSET: int

    @property
    def blocks(self) -> int:
        """Of the E channels."""
        return -(-self.E // self.COLUMNS)

    @property
    def TAPS(self) -> int:
        """K - 1 taps of the window as a power of two."""
        return taps_of_window(self.K)
