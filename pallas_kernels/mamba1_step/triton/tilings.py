"""How the Triton kernels of the Mamba-1 step cut a call up, by its number of rows: the one place for tile sizes."""

import dataclasses

from pallas_kernels.common.triton.tiles import CONVOLUTION_TILE, MOST_ROWS, Tile

# Up to so many rows the recurrence gives every row its own programs, which multiply without matrix units.
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
        advance: of the recurrence.
        project_out: of out-projection and residual stream.
        convolve: of the convolution alone, for many rows; `columns` and `warps` count, and `depth` is its rows.
    """

    project_in: Tile
    project_selection: Tile
    advance: RecurrenceTile
    project_out: Tile
    convolve: Tile = CONVOLUTION_TILE


def default_tiling(rows: int, *, width: int) -> Tiling:
    """The tiling for a number of rows and D, the width of the residual stream: the fastest of a search on an H100.

    One row is multiplied term by term: a program's columns are one piece of memory, all programs fit on the
    multiprocessors at once, and each of these has 40 KB or more under way where the matrix is that large. Narrow models
    have few columns, and so take narrow blocks to have bytes under way on all multiprocessors.
    """
    is_narrow = width < 2048
    if rows == 1:
        return Tiling(
            project_in=Tile(columns=8 if is_narrow else 16, depth=256, stages=3, warps=4),
            project_selection=Tile(columns=8, depth=128, stages=4, warps=1, parts=12 if is_narrow else 8),
            advance=RecurrenceTile(rows=1, channels=32, warps=4),
            project_out=Tile(columns=2, depth=512, stages=3, warps=2)
            if is_narrow
            else Tile(columns=4, depth=512, stages=4, warps=4),
        )
    if rows > MOST_ROWS:
        advance = RecurrenceTile(rows=4, channels=64, warps=4)
    else:
        advance = RecurrenceTile(rows=1, channels=32 if rows <= FEW_ROWS else 64, warps=4)
    return Tiling(
        project_in=Tile(columns=32, depth=128, stages=6, warps=2)
        if is_narrow
        else Tile(columns=64, depth=128, stages=4, warps=4),
        project_selection=Tile(columns=16, depth=128, stages=4, warps=2, parts=8),
        advance=advance,
        project_out=Tile(columns=16, depth=256, stages=5, warps=2),
    )
