"""The backward kernel of the selective scan on TPUs.

From the state before a span of tokens, its states and decays are computed again and kept on the chip; then the
gradient of the state runs back through them. One tile's way forward is independent of another's way back, so the
compiler's schedule has them side by side.
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

# Tiles whose gradients run back together: their sums for B and C leave the registers once.
TOGETHER = 2


def scratch_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of float32 memory on the chip."""
    channels, states = geometry.tiling.channels, geometry.states
    sums = geometry.tiling.tiles, SPAN * SUBLANES, LANES
    of_span = SPAN, channels
    return matrix_scratch(geometry) | {
        "steps": of_span,
        "decay_steps": of_span,
        "inputs": of_span,
        "dy_ungated": of_span,
        "dz_factor": of_span,
        "states": (SPAN, states, channels),
        "decays": (SPAN, states, channels),
        "dmatrix_lanes": (geometry.tiling.tokens, 2 * states, LANES),
        "dinputs_sums": sums,
        "dsteps_sums": sums,
        "y_sums": sums,
    }


def kernel(geometry: Geometry, features: Features, refs: Refs) -> None:
    """Gradients of a block of channels and a chunk of tokens, the last chunk first.

    The state's gradient stays in "dinitial_state" from chunk to chunk, sums over time stay in their outputs, and sums
    over channels in "dmatrix_lanes" until the last block.
    """
    step, block = pl.program_id(2), pl.program_id(3)
    spans = geometry.tiling.tokens // SPAN

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

    @pl.when(block == geometry.blocks - 1)
    def _():
        over(spans, lambda span, carry: _sum_lanes(geometry, refs, span) or carry)


def _go_back(geometry: Geometry, features: Features, refs: Refs, span, block) -> None:
    """Takes the state's gradient back over a span of tokens."""
    tiles = [tile_lanes(tile) for tile in range(geometry.tiling.tiles)]
    resets = turn_matrices(geometry, refs, span)
    for lanes in tiles:
        _enter(features, refs, span, lanes, block, resets)
    names = ("dinputs_sums", "dsteps_sums", *(("y_sums",) if "z" in refs else ()))

    def add_slice(index, sums):
        for first in range(0, len(tiles), TOGETHER):
            _go_back_tiles(geometry, refs, span, block, index, numbered(tiles, first, TOGETHER))
        return [[sums[i][k] + row_sums(refs[name], i) for k, name in enumerate(names)] for i in range(len(tiles))]

    zeros = [[jnp.zeros((SPAN, LANES))] * len(names)] * len(tiles)
    for lanes, sums in zip(tiles, over(geometry.slices, add_slice, zeros), strict=True):
        _leave(features, refs, span, lanes, block, *sums)


def _enter(features: Features, refs: Refs, span, lanes: slice, block, resets: jax.Array) -> None:
    """What the recurrences need of the sequences, row by row."""
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
    """Keeps the states before a span's tokens and the decays from there on; returns the state after the span."""
    rows = slice_rows(geometry, index)
    rates, h = refs["A"][block, rows, lanes], refs["checkpoints"][span, rows, lanes]
    for t in range(SPAN):
        decay = jnp.exp2(refs["decay_steps"][t : t + 1, lanes] * rates)
        refs["decays"][t, rows, lanes] = decay
        refs["states"][t, rows, lanes] = h
        h = decay * h + refs["inputs"][t : t + 1, lanes] * column_of(geometry, refs, "B", index, t)
    return h


def _go_back_tiles(geometry: Geometry, refs: Refs, span, block, index, tiles: dict[int, slice]) -> None:
    """The way back of a slice of states over a span of tokens, in a few tiles, given by number."""
    rows, second = slice_rows(geometry, index), slice_rows(geometry, index, offset=geometry.states)
    after = {i: _restore(geometry, refs, span, block, index, lanes) for i, lanes in tiles.items()}
    dh = {i: refs["dinitial_state"][block, rows, lanes] for i, lanes in tiles.items()}
    dA = {i: refs["dA"][block, rows, lanes] for i, lanes in tiles.items()}
    for t in reversed(range(SPAN)):
        B, C = (column_of(geometry, refs, name, index, t) for name in ("B", "C"))
        dB, dC = jnp.zeros_like(B), jnp.zeros_like(C)
        place = slice(t * SUBLANES, (t + 1) * SUBLANES)
        for i, lanes in tiles.items():
            dy = refs["dy_ungated"][t : t + 1, lanes]
            dC += dy * after[i]
            if "z" in refs:
                refs["y_sums"][i, place, :] = folded(after[i] * C)
            dh[i] += dy * C
            dB += dh[i] * refs["inputs"][t : t + 1, lanes]
            refs["dinputs_sums"][i, place, :] = folded(dh[i] * B)
            dh[i] *= refs["decays"][t, rows, lanes]
            after[i] = refs["states"][t, rows, lanes]
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

    `dinputs` is the gradient of dt x; `dsteps` that of dt by way of the decays, over log2(e); `y` the output without
    skip connection and gate.
    """
    tokens = span_tokens(span)
    x, dy = sequence(refs, "x", span, lanes), refs["dy_ungated"][:, lanes]
    dx = dinputs * refs["steps"][:, lanes]
    if "D" in refs:
        skip = refs["D"][block, :, lanes]
        dx = dx + dy * skip
        refs["dD"][block, :, lanes] += folded(dy * x)
        y = None if y is None else y + skip * x
    refs["dx"][tokens, lanes] = dx.astype(refs["dx"].dtype)
    if y is not None:
        refs["dz"][tokens, lanes] = (refs["dz_factor"][:, lanes] * y).astype(refs["dz"].dtype)
    ddt = dsteps * LN_2 + dinputs * x
    if features.softplus:
        ddt = ddt * sigmoid(step_argument(refs, span, lanes, block))
    refs["ddt"][tokens, lanes] = ddt.astype(refs["ddt"].dtype)
    if "ddt_bias" in refs:
        refs["ddt_bias"][block, :, lanes] += folded(ddt)


def _sum_lanes(geometry: Geometry, refs: Refs, span) -> None:
    """Writes the gradients of B and C of a span of tokens, from their sums over tiles and blocks."""
    columns = jnp.zeros((2 * geometry.states, LANES))
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    for t in range(SPAN):
        total = jnp.sum(refs["dmatrix_lanes"][span * SPAN + t], axis=1, keepdims=True)
        columns = jnp.where(lane == t, total, columns)
    refs["dmatrices"][span_tokens(span), :] = columns.T[:SPAN]
