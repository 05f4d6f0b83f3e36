"""How the Triton kernels of the Mamba-1 step cut a call up, by its number of rows: the one place for tile sizes."""

import dataclasses

from pallas_kernels.common.triton.tiles import LEAST_ROWS, Tile

# Up to so many rows the recurrence projects dt of each row itself, without matrix units.
FEW_ROWS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceTile:
    """What a program of the recurrence works on; sizes are powers of two.

    Attributes:
        rows: of a program: 1, or, where the step size is projected before, any power of two.
        channels: of a program, at least 16.
        warps: of a program.
    """

    rows: int
    channels: int
    warps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of all kernels.

    Attributes:
        project_in: of norm, in-projection and convolution.
        project_selection: of the x-projection.
        project_dt: of the dt-projection; None leaves it to the recurrence.
        advance: of the recurrence.
        project_out: of the out-projection; of one part it adds to the residual stream itself.
    """

    project_in: Tile
    project_selection: Tile
    project_dt: Tile | None
    advance: RecurrenceTile
    project_out: Tile


def default_tiling(rows: int, *, width: int) -> Tiling:
    """The tiling for a number of rows and D, the width of the residual stream: the fastest of a search on an H100.

    One row is multiplied term by term: a program's columns are one piece of memory, all programs fit on the
    multiprocessors at once, and each of these has 40 KB or more under way where the matrix is that large. Narrow models
    have few columns, and so take narrow blocks to have bytes under way on all multiprocessors.
    """
    is_narrow = width < 2048
    if rows == 1:
        return _one_row(is_narrow=is_narrow)
    if rows > LEAST_ROWS:
        return _many_rows(is_narrow=is_narrow)
    is_few = is_narrow or rows <= FEW_ROWS
    return Tiling(
        project_in=Tile(columns=32, depth=128, stages=6, warps=2)
        if is_narrow
        else Tile(columns=64, depth=128, stages=4, warps=4),
        project_selection=Tile(columns=16, depth=128, stages=4, warps=2, parts=8),
        project_dt=None if is_few else Tile(columns=64, depth=64, stages=4, warps=4),
        advance=RecurrenceTile(rows=1, channels=32 if rows <= 2 else 64 if is_few else 128, warps=4),
        project_out=Tile(columns=16, depth=128, stages=8, warps=2)
        if is_narrow
        else Tile(columns=16, depth=256, stages=5, warps=2),
    )


def _one_row(*, is_narrow: bool) -> Tiling:
    """Tiles of one row."""
    return Tiling(
        project_in=Tile(columns=8 if is_narrow else 16, depth=256, stages=3, warps=4),
        project_selection=Tile(columns=8, depth=128, stages=4, warps=1, parts=12 if is_narrow else 8),
        project_dt=None,
        advance=RecurrenceTile(rows=1, channels=32, warps=4),
        project_out=Tile(columns=2, depth=512, stages=3, warps=2)
        if is_narrow
        else Tile(columns=4, depth=512, stages=4, warps=4),
    )


def _many_rows(*, is_narrow: bool) -> Tiling:
    """Tiles of many rows: what programs read of the rows is more than of the matrices, and comes from the cache."""
    if is_narrow:
        return Tiling(
            project_in=Tile(rows=16, columns=64, depth=128, stages=3, warps=4),
            project_selection=Tile(rows=32, columns=16, depth=128, stages=4, warps=2, parts=4),
            project_dt=Tile(rows=32, columns=64, depth=64, stages=4, warps=4),
            advance=RecurrenceTile(rows=2, channels=32, warps=4),
            project_out=Tile(rows=64, columns=64, depth=128, stages=4, warps=4, parts=4),
        )
    return Tiling(
        project_in=Tile(rows=128, columns=64, depth=64, stages=4, warps=8),
        project_selection=Tile(rows=64, columns=32, depth=128, stages=4, warps=4, parts=8),
        project_dt=Tile(rows=32, columns=128, depth=64, stages=4, warps=4),
        advance=RecurrenceTile(rows=2, channels=32, warps=4),
        project_out=Tile(rows=128, columns=64, depth=64, stages=4, warps=4, parts=4),
    )
