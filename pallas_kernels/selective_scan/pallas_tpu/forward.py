"""The forward kernel of the selective scan on TPUs."""

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

# Tiles whose recurrences run together, for which B_t and C_t are copied into all lanes once.
TOGETHER = 4


def scratch_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of float32 memory on the chip."""
    tiles = geometry.tiling.tiles
    of_span = SPAN, tiles * LANES
    return matrix_scratch(geometry) | {
        "steps": of_span,
        "inputs": of_span,
        "y_sums": (tiles, SPAN * SUBLANES, LANES),
    }


def kernel(geometry: Geometry, features: Features, refs: Refs) -> None:
    """Computes a block of channels and a chunk of tokens; the state stays in "final_state" from chunk to chunk."""
    chunk, block = pl.program_id(2), pl.program_id(3)

    @pl.when(chunk == 0)
    def _():
        state = refs["final_state"]
        state[block] = refs["initial_state"][block] if "initial_state" in refs else jnp.zeros_like(state[block])

    def advance(span, carry):
        _advance(geometry, features, refs, span, block)
        return carry

    over(geometry.tiling.tokens // SPAN, advance)


def _advance(geometry: Geometry, features: Features, refs: Refs, span, block) -> None:
    """A span of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiling.tiles)]
    resets = turn_matrices(geometry, refs, span)
    for lanes in tiles:
        dt = enter_steps(features, refs, span, lanes, block, resets)
        refs["inputs"][:, lanes] = dt * sequence(refs, "x", span, lanes)

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
    """The way of a slice of states over a span of tokens, in a few tiles, given by number."""
    rows = slice_rows(geometry, index)
    h = {i: refs["final_state"][block, rows, lanes] for i, lanes in tiles.items()}
    rates = {i: refs["A"][block, rows, lanes] for i, lanes in tiles.items()}
    if features.checkpoints:
        for i, lanes in tiles.items():
            refs["checkpoints"][span, rows, lanes] = h[i]
    for t in range(SPAN):
        B, C = (column_of(geometry, refs, name, index, t) for name in ("B", "C"))
        for i, lanes in tiles.items():
            decay = jnp.exp2(refs["steps"][t : t + 1, lanes] * rates[i])
            h[i] = decay * h[i] + refs["inputs"][t : t + 1, lanes] * B
            refs["y_sums"][i, t * SUBLANES : (t + 1) * SUBLANES, :] = folded(h[i] * C)
    for i, lanes in tiles.items():
        refs["final_state"][block, rows, lanes] = h[i]


def _leave(refs: Refs, span, lanes: slice, block, y: jax.Array) -> None:
    """Writes y of a span of tokens and a tile, with skip connection and gate."""
    if "D" in refs:
        y = y + refs["D"][block, :, lanes] * sequence(refs, "x", span, lanes)
    refs["y"][span_tokens(span), lanes] = gated(refs, y, span, lanes).astype(refs["y"].dtype)
