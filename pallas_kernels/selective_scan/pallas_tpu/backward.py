"""The backward kernel of the selective scan on TPUs: equations 8 to 19 of README.md, a span of 16 tokens at a time.

From the state before a span, `_restore` computes its states and decays again (equations 2 and 4) and keeps them on the
chip; then the gradient of the state runs back through them (equations 10 to 15). The way forward of some tiles does not
depend on the way back of others, so the compiler's schedule interleaves them. `_enter` prepares the sequences for both,
`_leave` finishes their gradients.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.register_math import LN_2
from pallas_kernels.common.tpu_tiles import (
    LANES,
    SPAN,
    SUBLANES,
    Refs,
    folded,
    over,
    sequence,
    sigmoid,
    span_tokens,
    tile_lanes,
)
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_tpu.geometry import Geometry
from pallas_kernels.selective_scan.pallas_tpu.kernel import (
    column_of,
    matrix_scratch,
    numbered,
    row_sums,
    slice_rows,
    step_argument,
    step_size,
    turn_matrices,
)

# Tiles whose gradients run back together: their sums for B and C leave the registers once. Three or four need more
# registers than there are (docs/kernels.md, "Tried on TPUs": 138 and 144 bundles, against 132).
TOGETHER = 2


def scratch_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of float32 memory on the chip."""
    channels, states = geometry.tiling.channels, geometry.states
    sums = geometry.tiling.tiles, SPAN * SUBLANES, LANES
    of_span = SPAN, channels
    return matrix_scratch(geometry) | {
        # Of equation 1; and the same with RESET where a segment starts, for the exponents.
        "steps": of_span,
        "decay_steps": of_span,
        "inputs": of_span,
        # Equation 8; and equation 9 but for its factor p.
        "dy_ungated": of_span,
        "dz_factor": of_span,
        # h_{t-1} and a_t of all tokens of a span.
        "states": (SPAN, states, channels),
        "decays": (SPAN, states, channels),
        # Equation 14 before its sum over the 128 lanes, B above C, for a whole chunk: the blocks of a strip add to it.
        "dmatrix_lanes": (geometry.tiling.tokens, 2 * states, LANES),
        # Terms of equations 15, 17 and 5 that still differ by row: see `row_sums`.
        "dinputs_sums": sums,
        "dsteps_sums": sums,
        "y_sums": sums,
    }


def kernel(geometry: Geometry, features: Features, refs: Refs) -> None:
    """Gradients of a block of channels and a chunk of tokens, the last chunk first.

    The state's gradient stays in "dinitial_state" from chunk to chunk, sums over time stay in their outputs, and sums
    over channels in "dmatrix_lanes" until the last block.
    """
    # The index maps of the blocks turn time around: the first step of the grid sees the last chunk.
    step, block = pl.program_id(2), pl.program_id(3)
    spans = geometry.tiling.tokens // SPAN

    # Equation 10: g_L. What holds g ends as g_0, the gradient of the initial state.
    @pl.when(step == 0)
    def _():
        refs["dinitial_state"][block] = refs["dfinal_state"][block]
        for name in ("dA", "dD", "ddt_bias"):
            if name in refs:
                refs[name][block] = jnp.zeros_like(refs[name][block])

    @pl.when(block == 0)
    def _():
        refs["dmatrix_lanes"][...] = jnp.zeros_like(refs["dmatrix_lanes"])

    def go_back(index, carry):
        _go_back(geometry, features, refs, spans - 1 - index, block)
        return carry

    over(spans, go_back)

    # Only now have all channels of the strip added their terms: the costly sums over lanes run once, not once per
    # block.
    @pl.when(block == geometry.blocks - 1)
    def _():
        over(spans, lambda span, carry: _sum_lanes(geometry, refs, span) or carry)


def _go_back(geometry: Geometry, features: Features, refs: Refs, span, block) -> None:
    """Equations 8 to 19 for a span of tokens and all tiles of the block."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiling.tiles)]
    resets = turn_matrices(geometry, refs, span)
    for lanes in tiles:
        _enter(features, refs, span, lanes, block, resets)
    # Without a gate nothing needs equation 5 again.
    names = ("dinputs_sums", "dsteps_sums", *(("y_sums",) if "z" in refs else ()))

    def add_slice(index, sums):
        for first in range(0, len(tiles), TOGETHER):
            _go_back_tiles(geometry, refs, span, block, index, numbered(tiles, first, TOGETHER))
        return [[sums[i][k] + row_sums(refs[name], i) for k, name in enumerate(names)] for i in range(len(tiles))]

    zeros = [[jnp.zeros((SPAN, LANES))] * len(names)] * len(tiles)
    for lanes, sums in zip(tiles, over(geometry.slices, add_slice, zeros), strict=True):
        _leave(features, refs, span, lanes, block, *sums)


def _enter(features: Features, refs: Refs, span, lanes: slice, block, resets: jax.Array) -> None:
    """What the recurrences need of the sequences, row by row: equations 1, 3 without B, 8, and 9 without p."""
    dt = step_size(features, refs, span, lanes, block)
    refs["steps"][:, lanes] = dt
    refs["decay_steps"][:, lanes] = jnp.maximum(dt, resets)
    refs["inputs"][:, lanes] = dt * sequence(refs, "x", span, lanes)
    dy = sequence(refs, "dy", span, lanes)
    if "z" in refs:
        z = sequence(refs, "z", span, lanes)
        gate = sigmoid(z)
        dy = dy * gate
        refs["dz_factor"][:, lanes] = dy * (1.0 + z * (1.0 - gate))
        dy = dy * z
    refs["dy_ungated"][:, lanes] = dy


def _restore(geometry: Geometry, refs: Refs, span, block, index, lanes: slice) -> jax.Array:
    """Equations 2 and 4 again: keeps the state before every token of a span and its decay; returns the last state."""
    rows = slice_rows(geometry, index)
    rates, h = refs["A"][block, rows, lanes], refs["checkpoints"][span, rows, lanes]
    for t in range(SPAN):
        # Decays are kept, for equation 11: a load costs less than a second exponential here.
        decay = jnp.exp2(refs["decay_steps"][t : t + 1, lanes] * rates)
        refs["decays"][t, rows, lanes] = decay
        refs["states"][t, rows, lanes] = h
        h = decay * h + refs["inputs"][t : t + 1, lanes] * column_of(geometry, refs, "B", index, t)
    return h


def _go_back_tiles(geometry: Geometry, refs: Refs, span, block, index, tiles: dict[int, slice]) -> None:
    """Equations 10 to 15 for one slice of states, back through a span of 16 tokens, for the given tiles."""
    rows, second = slice_rows(geometry, index), slice_rows(geometry, index, offset=geometry.states)
    after = {i: _restore(geometry, refs, span, block, index, lanes) for i, lanes in tiles.items()}
    dh = {i: refs["dinitial_state"][block, rows, lanes] for i, lanes in tiles.items()}
    dA = {i: refs["dA"][block, rows, lanes] for i, lanes in tiles.items()}
    for t in reversed(range(SPAN)):
        B, C = (column_of(geometry, refs, name, index, t) for name in ("B", "C"))
        # Sums over these tiles, still by lane, of equation 14.
        dB, dC = jnp.zeros_like(B), jnp.zeros_like(C)
        place = slice(t * SUBLANES, (t + 1) * SUBLANES)
        for i, lanes in tiles.items():
            dy = refs["dy_ungated"][t : t + 1, lanes]
            # Equation 14 for C, and the terms of 5.
            dC += dy * after[i]
            if "z" in refs:
                refs["y_sums"][i, place, :] = folded(after[i] * C)
            # Equation 10; then 14 for B, and the terms of 15.
            dh[i] += dy * C
            dB += dh[i] * refs["inputs"][t : t + 1, lanes]
            refs["dinputs_sums"][i, place, :] = folded(dh[i] * B)
            # Equation 11. The state before this token is the one after the token that comes next.
            dh[i] *= refs["decays"][t, rows, lanes]
            after[i] = refs["states"][t, rows, lanes]
            # Equation 12, the terms of the sum in 17 (A is in units of log2: `_leave` makes up for it), and 13.
            dexponent = dh[i] * after[i]
            refs["dsteps_sums"][i, place, :] = folded(dexponent * refs["A"][block, rows, lanes])
            dA[i] += dexponent * refs["steps"][t : t + 1, lanes]
        refs["dmatrix_lanes"][span * SPAN + t, rows, :] += dB
        refs["dmatrix_lanes"][span * SPAN + t, second, :] += dC
    for i, lanes in tiles.items():
        refs["dinitial_state"][block, rows, lanes] = dh[i]
        refs["dA"][block, rows, lanes] = dA[i]


def _leave(features: Features, refs: Refs, span, lanes: slice, block, dinputs, dsteps, y=None) -> None:
    """Writes the gradients of the sequences of a span of tokens and a tile.

    `dinputs` is q of equation 15; `dsteps` the sum over states in equation 17, for A log2(e); `y` the sum over states
    in equation 5, if there is a gate.
    """
    tokens = span_tokens(span)
    x, dy = sequence(refs, "x", span, lanes), refs["dy_ungated"][:, lanes]
    # Equations 16 and 19; the skip completes p of equation 5.
    dx = dinputs * refs["steps"][:, lanes]
    if "D" in refs:
        skip = refs["D"][block, :, lanes]
        dx = dx + dy * skip
        refs["dD"][block, :, lanes] += folded(dy * x)
        y = None if y is None else y + skip * x
    refs["dx"][tokens, lanes] = dx.astype(refs["dx"].dtype)
    # Equation 9.
    if y is not None:
        refs["dz"][tokens, lanes] = (refs["dz_factor"][:, lanes] * y).astype(refs["dz"].dtype)
    # Equations 17 and 18: ln 2 turns the gradient of an exponent of 2 into that of one of e.
    ddt = dsteps * LN_2 + dinputs * x
    if features.softplus:
        ddt = ddt * sigmoid(step_argument(refs, span, lanes, block))
    refs["ddt"][tokens, lanes] = ddt.astype(refs["ddt"].dtype)
    # Sums over time keep 8 rows apart; XLA adds those.
    if "ddt_bias" in refs:
        refs["ddt_bias"][block, :, lanes] += folded(ddt)


def _sum_lanes(geometry: Geometry, refs: Refs, span) -> None:
    """Equation 14 for a span of tokens: sums over lanes what tiles and blocks have added up, and writes it."""
    columns = jnp.zeros((2 * geometry.states, LANES))
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    # A token's sums come as a column; SPAN of them side by side are turned into rows by one transposition.
    for t in range(SPAN):
        total = jnp.sum(refs["dmatrix_lanes"][span * SPAN + t], axis=1, keepdims=True)
        columns = jnp.where(lane == t, total, columns)
    refs["dmatrices"][span_tokens(span), :] = columns.T[:SPAN]
