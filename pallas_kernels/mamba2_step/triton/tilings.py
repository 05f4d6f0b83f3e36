"""How the Triton kernels of the Mamba-2 step cut a call up, by its number of rows: the one place for tile sizes."""

import dataclasses

from pallas_kernels.common.triton.tiles import LEAST_ROWS, Tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceTile:
    """What a program of the recurrence works on: one row, and part of a head.

    Attributes:
        warps: of a program.
        channels: of a head, a power of two.
        registers: that a thread may have; None is as many as it likes.
    """

    warps: int
    channels: int
    registers: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of all kernels.

    Attributes:
        project_in: of norm, in-projections and convolutions.
        advance: of the recurrence.
        project_out: of gated norm and out-projection; of one part it adds to the residual stream itself.
    """

    project_in: Tile
    advance: RecurrenceTile
    project_out: Tile


def default_tiling(rows: int, *, width: int, has_ring: bool = False) -> Tiling:
    """The tiling for a number of rows and D, the width of the residual stream: the fastest of a search on an H100.

    A program of a ring has much else to load, and 12 of one warp fit on a multiprocessor at 168 registers a thread.

    Args:
        rows: B.
        width: D.
        has_ring: whether inputs are kept beside the state.
    """
    is_narrow = width < 2048
    if has_ring:
        advance = RecurrenceTile(channels=16, warps=1, registers=168)
    elif rows == 1:
        advance = RecurrenceTile(channels=8, warps=2)
    else:
        advance = RecurrenceTile(channels=32, warps=4)
    if rows == 1:
        return Tiling(
            project_in=Tile(columns=8 if is_narrow else 16, depth=256, stages=3 if is_narrow else 4, warps=4),
            advance=advance,
            project_out=Tile(columns=2, depth=512, stages=3, warps=2)
            if is_narrow
            else Tile(columns=4, depth=1024, stages=4, warps=4),
        )
    if rows > LEAST_ROWS:
        return Tiling(
            project_in=Tile(rows=16, columns=64, depth=128, stages=3, warps=4)
            if is_narrow
            else Tile(rows=128, columns=64, depth=64, stages=4, warps=8),
            advance=advance,
            project_out=Tile(rows=64, columns=64, depth=128, stages=4, warps=4, parts=4)
            if is_narrow
            else Tile(rows=128, columns=64, depth=64, stages=4, warps=4, parts=4),
        )
    return Tiling(
        project_in=Tile(columns=32, depth=128, stages=6, warps=2)
        if is_narrow
        else Tile(columns=64, depth=128, stages=4, warps=4),
        advance=advance,
        project_out=Tile(columns=16, depth=256, stages=5, warps=2),
    )
