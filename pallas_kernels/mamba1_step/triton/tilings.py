"""How the Triton kernels of the Mamba-1 step cut a call up, by its number of rows: the one place for tile sizes."""

import dataclasses

# Rows that the kernels which stream a matrix take: the least that matrix units multiply. More rows are left to XLA's
# products, which have an arithmetic intensity worth their tiles.
MOST_ROWS = 16
# Up to so many rows the recurrence gives every row its own programs, which multiply without matrix units.
FEW_ROWS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program of a product works on at a time; sizes are powers of two.

    Attributes:
        columns: of a program, at least 16.
        depth: terms of the sum, at least 16.
        stages: loads under way at a time.
        warps: of a program.
        parts: into which the sum is cut.
    """

    columns: int
    depth: int
    stages: int
    warps: int
    parts: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceTile:
    """What a program of the recurrence works on; sizes are powers of two.

    Attributes:
        rows: of a program, 1 or at least 16.
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
        project_selection: of the x-projection; None makes it part of the kernel before.
        advance: of the recurrence.
        project_out: of out-projection and residual stream.
        convolve: of the convolution alone, for many rows; `columns` and `warps` count, and `depth` is its rows.
    """

    project_in: Tile
    project_selection: Tile | None
    advance: RecurrenceTile
    project_out: Tile
    convolve: Tile = Tile(columns=128, depth=8, stages=1, warps=4)


def default_tiling(rows: int, *, width: int) -> Tiling:
    """The tiling for a number of rows and D, the width of the residual stream: the fastest of a grid on an H100.

    Narrow models have few columns, and so take narrow blocks to have bytes under way on all multiprocessors.
    """
    is_narrow, is_few = width < 2048, rows <= FEW_ROWS
    if rows > MOST_ROWS:
        advance = RecurrenceTile(rows=MOST_ROWS, channels=16, warps=4)
    else:
        advance = RecurrenceTile(rows=1, channels=32 if is_few else 64, warps=4)
    # What a part costs the kernel after it grows with the rows.
    parts = 16 if is_few else 8
    if is_narrow:
        return Tiling(
            project_in=Tile(columns=32, depth=128, stages=5, warps=2),
            project_selection=Tile(columns=32, depth=64, stages=4, warps=4 if is_few else 2, parts=parts),
            advance=advance,
            project_out=Tile(columns=16, depth=128 if is_few else 256, stages=6, warps=4 if is_few else 2),
        )
    return Tiling(
        project_in=Tile(columns=64, depth=128, stages=4, warps=4),
        project_selection=Tile(columns=32 if is_few else 16, depth=64, stages=4, warps=4 if is_few else 2, parts=parts),
        advance=advance,
        project_out=Tile(columns=32, depth=128 if is_few else 256, stages=6 if is_few else 5, warps=4),
    )
