"""The forward kernel of the selective scan on TPUs: equations 1 to 6 of README.md, a span of 16 tokens at a time.

A span passes through three stages: its steps and inputs (equations 1 and 3, without B) go to memory row by row, the
recurrence (equations 2, 4 and 5) runs slice by slice through the tiles, and `_leave` adds the skip and the gate.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.tpu_tiles import (
    LANES,
    SPAN,
    SUBLANES,
    Refs,
    folded,
    over,
    sequence,
    span_tokens,
    tile_lanes,
)
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_tpu.geometry import Geometry
from pallas_kernels.selective_scan.pallas_tpu.kernel import (
    column_of,
    enter_steps,
    gated,
    matrix_scratch,
    numbered,
    row_sums,
    slice_rows,
    turn_matrices,
)

# Tiles whose recurrences run together, for which B_t and C_t are copied into all lanes once. Four fill each other's
# waiting times; with 6 or 12 the states no longer fit into registers (docs/kernels.md, "Tried on TPUs": 47 bundles
# against 48, 52).
TOGETHER = 4


def scratch_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of float32 memory on the chip."""
    tiles = geometry.tiling.tiles
    of_span = SPAN, tiles * LANES
    return matrix_scratch(geometry) | {
        "steps": of_span,
        "inputs": of_span,
        # Terms of equation 5 that still differ by row, 8 rows a token: see `row_sums`.
        "y_sums": (tiles, SPAN * SUBLANES, LANES),
    }


def kernel(geometry: Geometry, features: Features, refs: Refs) -> None:
    """Computes a block of channels and a chunk of tokens; the state stays in "final_state" from chunk to chunk."""
    chunk, block = pl.program_id(2), pl.program_id(3)

    # Chunks of a strip follow each other on the same core, so the output's block serves as the state's memory.
    @pl.when(chunk == 0)
    def _():
        state = refs["final_state"]
        state[block] = refs["initial_state"][block] if "initial_state" in refs else jnp.zeros_like(state[block])

    def advance(span, carry):
        _advance(geometry, features, refs, span, block)
        return carry

    over(geometry.tiling.tokens // SPAN, advance)


def _advance(geometry: Geometry, features: Features, refs: Refs, span, block) -> None:
    """Equations 1 to 6 for a span of tokens and all tiles of the block."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiling.tiles)]
    resets = turn_matrices(geometry, refs, span)
    # Equation 3 without B_t, which differs by state.
    for lanes in tiles:
        dt = enter_steps(features, refs, span, lanes, block, resets)
        refs["inputs"][:, lanes] = dt * sequence(refs, "x", span, lanes)

    # A slice leaves its terms of equation 5 in "y_sums"; they are summed over rows before the next slice overwrites
    # them.
    def add_slice(index, y):
        for first in range(0, len(tiles), TOGETHER):
            _advance_tiles(geometry, features, refs, span, block, index, numbered(tiles, first, TOGETHER))
        return [sums + row_sums(refs["y_sums"], i) for i, sums in enumerate(y)]

    zeros = [jnp.zeros((SPAN, LANES))] * len(tiles)
    for lanes, y in zip(tiles, over(geometry.slices, add_slice, zeros), strict=True):
        _leave(refs, span, lanes, block, y)


def _advance_tiles(
    geometry: Geometry, features: Features, refs: Refs, span, block, index, tiles: dict[int, slice]
) -> None:
    """Advances one slice of states through a span of 16 tokens, for the given tiles, named by number."""
    rows = slice_rows(geometry, index)
    h = {i: refs["final_state"][block, rows, lanes] for i, lanes in tiles.items()}
    rates = {i: refs["A"][block, rows, lanes] for i, lanes in tiles.items()}
    # The backward kernel starts from the state before each span.
    if features.checkpoints:
        for i, lanes in tiles.items():
            refs["checkpoints"][span, rows, lanes] = h[i]
    for t in range(SPAN):
        B, C = (column_of(geometry, refs, name, index, t) for name in ("B", "C"))
        # Tiles do not depend on each other: the compiler interleaves them, so exponentials of one hide behind the
        # others.
        for i, lanes in tiles.items():
            # Equations 2 and 4; then the terms of 5, of which the two registers of 8 states are added at once.
            decay = jnp.exp2(refs["steps"][t : t + 1, lanes] * rates[i])
            h[i] = decay * h[i] + refs["inputs"][t : t + 1, lanes] * B
            refs["y_sums"][i, t * SUBLANES : (t + 1) * SUBLANES, :] = folded(h[i] * C)
    for i, lanes in tiles.items():
        refs["final_state"][block, rows, lanes] = h[i]


def _leave(refs: Refs, span, lanes: slice, block, y: jax.Array) -> None:
    """The skip of equation 5 and the gate of equation 6; writes y of a span of tokens and a tile."""
    if "D" in refs:
        y = y + refs["D"][block, :, lanes] * sequence(refs, "x", span, lanes)
    refs["y"][span_tokens(span), lanes] = gated(refs, y, span, lanes).astype(refs["y"].dtype)
