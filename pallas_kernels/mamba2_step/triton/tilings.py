"""How the Triton kernels of the Mamba-2 step cut a call up, by its number of rows: the one place for tile sizes."""

import dataclasses

from pallas_kernels.common.triton.tiles import CONVOLUTION_TILE, Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceTile:
    """What a program of the recurrence works on: one row, and part of a head.

    Attributes:
        warps: of a program.
        channels: of a head, a power of two.
    """

    warps: int
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of all kernels.

    Attributes:
        project_in: of norm, in-projections and convolutions.
        advance: of the recurrence.
        project_out: of gated norm, out-projection and residual stream.
        convolve: of a convolution alone, for many rows; `columns` and `warps` count, and `depth` is its rows.
    """

    project_in: Tile
    advance: RecurrenceTile
    project_out: Tile
    convolve: Tile = CONVOLUTION_TILE


def default_tiling(rows: int, *, width: int) -> Tiling:
    """The tiling for a number of rows and D, the width of the residual stream: by arithmetic on bytes under way.

    No GPU has measured it yet.
    """
    is_narrow = width < 2048
    if rows == 1:
        return Tiling(
            project_in=Tile(columns=8 if is_narrow else 16, depth=256, stages=3 if is_narrow else 4, warps=4),
            advance=RecurrenceTile(channels=16, warps=2),
            project_out=Tile(columns=2, depth=512, stages=3, warps=2)
            if is_narrow
            else Tile(columns=4, depth=1024, stages=4, warps=4),
        )
    return Tiling(
        project_in=Tile(columns=32 if is_narrow else 64, depth=128, stages=4, warps=4),
        advance=RecurrenceTile(channels=64, warps=4),
        project_out=Tile(columns=16, depth=256, stages=5, warps=2),
    )
