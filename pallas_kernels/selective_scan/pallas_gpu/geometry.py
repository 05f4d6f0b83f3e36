"""Sizes of the GPU kernels of the selective scan: how work is spread over threads, blocks and shared memory."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.rounding import ceil_div
from pallas_kernels.common.warpgroup import LANES, THREADS, WARPS

# Tokens between two stored states, and states of a channel that are worked on together. Both are powers of two that
# divide the threads of a block; the sizes below are derived from them.
CHUNK = 16
SLICE = 16
# Consecutive tokens whose sums over states are exchanged between lanes together: as many as one access of 16 bytes
# holds.
SPAN = 4
# Step that stands for a reset (README.md, "Exponentials"): finite, and exp2(RESET * A) is exactly zero for every decay
# rate from `decay_rates`.
RESET = 3.0e38
# Threads that share a token at the edges of a chunk.
EDGE_LANES = THREADS // CHUNK
# States of a token's row of B or C that each of them reads.
EDGE_STATES = SLICE // EDGE_LANES
# A row of B next to C in shared memory, padded so that rows start in different banks.
MATRIX_PITCH = 2 * SLICE + 4
# Floats of a channel's slot in shared memory: a value of each of SPAN tokens, or a pair of values of each of PAIRED
# tokens.
SLOT = 4
PAIRED = SLOT // 2

CONSTANTS = ("D", "dt_bias")
# Floats between the constants of two threads: keeps their 16-byte accesses in different banks, and aligned.
CONSTANT_PADDING = 4
# Shared memory has as many banks of 4 bytes as a warp has lanes: eight slots of 4 floats cover all of them once.
SLOTS_TOGETHER = LANES // SLOT


def log2(number: int) -> int:
    """The exponent of a power of two, for shifts in the kernels.

    Raises:
        ValueError: it is not one, so that the kernels cannot be built.
    """
    if number < 1 or number & (number - 1):
        raise ValueError(f"the GPU kernels of the scan divide by shifts: {number} is not a power of two")
    return number.bit_length() - 1


for _size in (CHUNK, SLICE, SPAN, SLOT, PAIRED, EDGE_LANES, EDGE_STATES, LANES):
    log2(_size)
# A bfloat16 word holds two states of a row of B or C, so a thread at the edges must read at least two.
if EDGE_STATES < 2:
    raise ValueError(
        f"a thread at the edges reads {EDGE_STATES} states of a row, at least 2 are needed: make CHUNK ({CHUNK}) larger"
    )
if SLOT != SPAN:
    raise ValueError(f"a slot holds a value of each token of a span: SLOT is {SLOT} and SPAN {SPAN}, make them equal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a kernel's work is spread over the chip.

    Attributes:
        lanes_per_channel: S, the lanes that share a channel: 2, 4 or 8.
        rows: R, the channels of a lane: 1 or 2.
        parts: pieces of the sequence that run at the same time; more than one needs the edge kernel first.
    """

    lanes_per_channel: int
    rows: int
    parts: int = 1

    @property
    def states_per_lane(self) -> int:
        return SLICE // self.lanes_per_channel

    @property
    def channels_per_warp(self) -> int:
        return LANES // self.lanes_per_channel * self.rows

    @property
    def channels_per_block(self) -> int:
        return WARPS * self.channels_per_warp

    @property
    def edge_channels(self) -> int:
        """Channels of one token that a thread reads and writes."""
        return self.channels_per_block // EDGE_LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a scan as the kernels see it: everything is padded to whole blocks.

    Sequences are (B L, G F), matrices (B L, G N), states (B G F, N), where F is the number of channels of a group.

    Attributes:
        batch, groups, channels, states: B, G, F and N.
        length: L, a multiple of CHUNK.
        valid_length: tokens that exist; the rest leave the state as it is.
        tiling: how the work is cut into blocks and lanes.
    """

    batch: int
    groups: int
    channels: int
    states: int
    length: int
    valid_length: int
    tiling: Tiling

    @property
    def blocks(self) -> int:
        return self.channels // self.tiling.channels_per_block

    @property
    def chunks(self) -> int:
        return self.length // CHUNK

    @property
    def chunks_per_part(self) -> int:
        """Chunks of every part but the last, which may have fewer."""
        return ceil_div(self.chunks, self.tiling.parts)

    @property
    def slices(self) -> int:
        return self.states // SLICE

    @property
    def width(self) -> int:
        """Channels of all groups."""
        return self.groups * self.channels

    def grid(self, parts: int) -> dict[str, int]:
        """The grid of a kernel over some parts of the sequence."""
        return {"part": parts, "batch": self.batch, "group": self.groups, "block": self.blocks}


def common_scratch(tiling: Tiling) -> dict[str, Any]:
    """Shared memory that every kernel has, in float32."""
    floats = {
        # D and dt_bias, see `keep_constants`.
        "constants": len(CONSTANTS) * EDGE_LANES * (tiling.edge_channels + CONSTANT_PADDING),
        # A step for the exponent and dt x, per token and channel.
        "pairs": CHUNK // PAIRED * slot_position(tiling.channels_per_block),
        # A slice of B and C of a chunk, in float32.
        "matrices": CHUNK * MATRIX_PITCH,
    }
    return {name: plgpu.SMEM((count,), jnp.float32) for name, count in floats.items()}


def value_slots(tiling: Tiling) -> int:
    """Floats of shared memory for a value for every token of a chunk and channel of a block."""
    return CHUNK // SPAN * slot_position(tiling.channels_per_block)


def slot_position(channel):
    """Position of a channel's slot in shared memory.

    After every SLOTS_TOGETHER slots one is left free, so that both roles of threads hit different banks: the recurrence
    reads neighbouring channels, the edges write channels that are EDGE_LANES or so apart.
    """
    return channel * SLOT + (channel >> log2(SLOTS_TOGETHER)) * SLOT
