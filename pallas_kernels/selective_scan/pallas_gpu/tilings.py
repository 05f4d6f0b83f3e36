"""The choice of a tiling by the shape of the problem, as measured on an H100.

`python benchmarks/tune_scan.py` measures; the figures are in `benchmarks/results/scan_tilings_2026-11-24.md`.

The larger a lane's share of a channel and the more channels it has, the less it reads from shared memory for every
state. But time within a part of the sequence is sequential: small problems fill the chip only with several parts at
once, which costs one more pass over the sequence, and those in between do best with smaller shares.
"""

import dataclasses

from pallas_kernels.common.rounding import ceil_div
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, SLICE, Tiling

# Blocks that an H100 runs at once: in each of its 132 multiprocessors, registers and shared memory have room for four
# of the forward kernel and two of the backward kernel (docs/kernels.md, "Tried").
_FORWARD_BLOCKS = 4 * 132
_BACKWARD_BLOCKS = 2 * 132
# With at most this many batch x channel pairs, cut the sequence into parts; with at least this many, use the largest
# lane shares. In the results file 4096 pairs do best in parts and 12,288 whole; 12,288 with small shares and 24,576
# with large.
_MOST_CHANNELS_IN_PARTS = 8192
_LEAST_CHANNELS_FOR_LARGE_SHARES = 16384
# Shorter parts spend their time on starting: each block first runs equation 21 over all parts before its own.
_LEAST_TOKENS_OF_A_PART = 256
# With more slices of states, lanes with two channels need too much shared memory, which holds the states of all slices;
# `test_tilings_fit` adds it up.
_MOST_SLICES_FOR_TWO_ROWS = 4

# Fewer lanes per channel: a lane has more states, so what it reads of a channel serves more arithmetic.
_LARGE_SHARES = Tiling(lanes_per_channel=4, rows=2)
_SMALL_SHARES = Tiling(lanes_per_channel=8, rows=2)
_MANY_STATES = Tiling(lanes_per_channel=4, rows=1)


def choose_tilings(batch: int, length: int, channels: int, states: int) -> tuple[Tiling, Tiling]:
    """Tilings of the forward and the backward pass for x of shape (batch, length, channels) and N states."""
    # What can run at the same time without parts: every batch row and channel is a recurrence of its own.
    walks = batch * channels
    many_states = states > _MOST_SLICES_FOR_TWO_ROWS * SLICE
    if walks > _MOST_CHANNELS_IN_PARTS:
        large = walks >= _LEAST_CHANNELS_FOR_LARGE_SHARES
        tiling = _MANY_STATES if many_states else _LARGE_SHARES if large else _SMALL_SHARES
        return tiling, tiling
    candidates = (_MANY_STATES,) if many_states else (_LARGE_SHARES, _SMALL_SHARES)
    forward = _in_parts(candidates, walks, length, _FORWARD_BLOCKS)
    return forward, _in_parts(candidates, walks, length, _BACKWARD_BLOCKS)


def _in_parts(candidates: tuple[Tiling, ...], walks: int, length: int, blocks: int) -> Tiling:
    """The first candidate that fills two fifths of the chip or more, in as many parts as fill it."""
    most_parts = max(1, length // _LEAST_TOKENS_OF_A_PART)
    chosen = []
    for tiling in candidates:
        parts = max(1, min(blocks * tiling.channels_per_block // walks, most_parts))
        chosen.append(dataclasses.replace(tiling, parts=_without_empty_parts(length, parts)))
    # A tiling that leaves three fifths of the chip empty loses more than larger shares gain.
    filled = [tiling for tiling in chosen if 5 * tiling.parts * walks >= 2 * blocks * tiling.channels_per_block]
    return (filled or chosen[-1:])[0]


def _without_empty_parts(length: int, parts: int) -> int:
    """Number of parts of whole chunks that a sequence really has when it is cut into `parts` of equal length."""
    chunks = ceil_div(length, CHUNK)
    return ceil_div(chunks, ceil_div(chunks, parts))
