"""The choice of a tiling by the shape of the problem, as measured on an H100 by `benchmarks/tune_scan.py`.

The larger a lane's share of a channel and the more channels it has, the less it reads from shared memory for every
state. But time within a part of the sequence is sequential: small problems fill the chip only with several parts at
once, which costs one more pass over the sequence, and those in between do best with smaller shares.
"""

import dataclasses

from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, SLICE, Tiling

# Blocks that an H100 runs at once: 132 multiprocessors times those that registers and shared memory leave room for.
_FORWARD_BLOCKS = 4 * 132
_BACKWARD_BLOCKS = 2 * 132
# Up to so many channels of all batch rows the sequence is cut into parts, and from so many on lanes get the most work.
_MOST_CHANNELS_IN_PARTS = 8192
_LEAST_CHANNELS_FOR_LARGE_SHARES = 16384
# Shorter parts spend their time on starting.
_LEAST_TOKENS_OF_A_PART = 256
# With more slices of states, lanes with two channels need too much shared memory.
_MOST_SLICES_FOR_TWO_ROWS = 4

_LARGE_SHARES = Tiling(lanes_per_channel=4, rows=2)
_SMALL_SHARES = Tiling(lanes_per_channel=8, rows=2)
_MANY_STATES = Tiling(lanes_per_channel=4, rows=1)


def choose_tilings(batch: int, length: int, channels: int, states: int) -> tuple[Tiling, Tiling]:
    """Tilings of the forward and the backward pass for x of shape (batch, length, channels) and N states."""
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
    filled = [tiling for tiling in chosen if 5 * tiling.parts * walks >= 2 * blocks * tiling.channels_per_block]
    return (filled or chosen[-1:])[0]


def _without_empty_parts(length: int, parts: int) -> int:
    """Number of parts of whole chunks that a sequence really has when it is cut into `parts` of equal length."""
    chunks = -(-length // CHUNK)
    return -(-chunks // -(-chunks // parts))
