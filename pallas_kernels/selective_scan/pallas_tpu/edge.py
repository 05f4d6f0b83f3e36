"""The kernel for TPUs that takes a state, or its gradient, through all tokens and leaves only what comes out."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.tpu_tiles import GROUP, LANES, Refs, over, sequence, tile_lanes
from pallas_kernels.selective_scan.argument_layout import Features
from pallas_kernels.selective_scan.pallas_tpu.forward import TOGETHER
from pallas_kernels.selective_scan.pallas_tpu.geometry import Geometry
from pallas_kernels.selective_scan.pallas_tpu.kernel import (
    column_of,
    enter_steps,
    gated,
    matrix_scratch,
    numbered,
    slice_rows,
    turn_matrices,
)


def scratch_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of float32 memory on the chip."""
    of_group = GROUP, geometry.tiling.tiles * LANES
    return matrix_scratch(geometry) | {"steps": of_group, "inputs": of_group}


def kernel(geometry: Geometry, features: Features, refs: Refs) -> None:
    """Takes a block of channels through a chunk of tokens; the state stays in the output from chunk to chunk.

    h_t = a_t h_{t-1} + dt_t x_t B_t into "final_state", or if there is a "dy", from the last chunk to the first,
    dh_{t-1} = a_t (dh_t + dy_t C_t) into "dinitial_state", with dy before the gate; C is in the place of B.
    """
    chunk, block = pl.program_id(2), pl.program_id(3)
    groups = geometry.tiling.tokens // GROUP
    state = refs[_output(refs)]

    @pl.when(chunk == 0)
    def _():
        state[block] = jnp.zeros_like(state[block])

    def advance(index, carry):
        _advance(geometry, features, refs, groups - 1 - index if "dy" in refs else index, block)
        return carry

    over(groups, advance)


def _output(refs: Refs) -> str:
    return "dinitial_state" if "dy" in refs else "final_state"


def _advance(geometry: Geometry, features: Features, refs: Refs, group, block) -> None:
    """A group of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiling.tiles)]
    resets = turn_matrices(geometry, refs, group)
    for lanes in tiles:
        dt = enter_steps(features, refs, group, lanes, block, resets)
        if "dy" in refs:
            refs["inputs"][:, lanes] = gated(refs, sequence(refs, "dy", group, lanes), group, lanes)
        else:
            refs["inputs"][:, lanes] = dt * sequence(refs, "x", group, lanes)

    def advance_slice(index, carry):
        for first in range(0, len(tiles), TOGETHER):
            _advance_tiles(geometry, refs, block, index, numbered(tiles, first, TOGETHER))
        return carry

    over(geometry.slices, advance_slice)


def _advance_tiles(geometry: Geometry, refs: Refs, block, index, tiles: dict[int, slice]) -> None:
    """The way of a slice of states over a group of tokens, in a few tiles, given by number."""
    state, is_reversed = refs[_output(refs)], "dy" in refs
    rows = slice_rows(geometry, index)
    h = {i: state[block, rows, lanes] for i, lanes in tiles.items()}
    rates = {i: refs["A"][block, rows, lanes] for i, lanes in tiles.items()}
    for t in reversed(range(GROUP)) if is_reversed else range(GROUP):
        column = column_of(geometry, refs, "B", index, t)
        for i, lanes in tiles.items():
            decay = jnp.exp2(refs["steps"][t : t + 1, lanes] * rates[i])
            more = refs["inputs"][t : t + 1, lanes] * column
            h[i] = decay * (h[i] + more) if is_reversed else decay * h[i] + more
    for i, lanes in tiles.items():
        state[block, rows, lanes] = h[i]
