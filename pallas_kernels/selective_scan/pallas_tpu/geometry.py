"""Sizes of the TPU kernels of the selective scan: how work is cut into blocks, and where blocks lie in the arrays."""

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.common.tpu_tiles import LANES, SPAN, SUBLANES

# States that are carried in registers at the same time: two registers of 8 rows for a tile of channels.
SLICE = 16
# Step that stands for a reset (README.md, "Exponentials"): finite, and exp2(RESET * A) is exactly zero for every decay
# rate from `decay_rates`.
RESET = 3.0e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a kernel's work is cut into blocks.

    Attributes:
        tokens: number of tokens in a block, a multiple of SPAN.
        tiles: number of tiles in a block, of LANES channels each.
    """

    tokens: int
    tiles: int

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.tiles * LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a scan as the kernels see it: everything is padded to whole blocks.

    The grid is (batch, strip, chunk, block), the last changing fastest. A strip is a group of channels with the same B
    and C, or a piece of one. Strips are independent of each other; the blocks of a strip add to the same gradients of B
    and C.

    Attributes:
        batch, length, states: sizes, padded.
        groups: number of groups of channels that share B and C.
        strips_per_group: number of strips that a group is cut into.
        channels: number of channels in a group, padded.
        tiling: how the work is cut into blocks.
    """

    batch: int
    length: int
    states: int
    groups: int
    strips_per_group: int
    channels: int
    tiling: Tiling

    @property
    def strips(self) -> int:
        return self.groups * self.strips_per_group

    @property
    def blocks(self) -> int:
        """Number of blocks along the channels of a strip."""
        return self.channels // self.strips_per_group // self.tiling.channels

    @property
    def chunks(self) -> int:
        return self.length // self.tiling.tokens

    @property
    def width(self) -> int:
        """Number of channels in all groups together, padded."""
        return self.groups * self.channels

    @property
    def slice_states(self) -> int:
        """States of a slice."""
        return min(self.states, SLICE)

    @property
    def slices(self) -> int:
        return self.states // self.slice_states

    @property
    def matrix_columns(self) -> int:
        """B, C and the mark of a segment's first token."""
        return 2 * self.states + 1

    @property
    def grid(self) -> tuple[int, ...]:
        return self.batch, self.strips, self.chunks, self.blocks

    def shape(self, kind: str) -> tuple[int, ...]:
        """Shape of an array: x, B with C, their gradients, A, D, a state, a sum over time, states of groups."""
        # Arrays by channel have the blocks in front, so that the kernel picks its own with an index of the first axis.
        per_block = self.strips * self.blocks
        channels = self.tiling.channels
        return {
            "sequence": (self.batch, self.length, self.width),
            "matrices": (self.batch, self.groups, self.length, self.matrix_columns),
            "dmatrices": (self.batch, self.strips, self.length, 2 * self.states),
            "rates": (per_block, self.states, channels),
            "channels": (per_block, 1, channels),
            "state": (self.batch, per_block, self.states, channels),
            "rows": (self.batch, per_block, SUBLANES, channels),
            "checkpoints": (self.batch, self.length // SPAN, per_block, self.states, channels),
        }[kind]

    def spec(self, kind: str, *, is_reversed: bool) -> pl.BlockSpec:
        """The part of an array that a step of the grid sees; time runs backwards if `is_reversed`.

        The index of what belongs to a strip depends on neither chunk nor block, so Pallas fetches it once for the strip
        and writes it back once: state and sums over time stay on the chip in between.
        """
        tokens, channels, states, blocks = self.tiling.tokens, self.tiling.channels, self.states, self.blocks

        def chunk(step):
            return self.chunks - 1 - step if is_reversed else step

        # The letters are the grid's: batch, strip, time (chunk), and d for the block.
        block_shape, index = {
            "sequence": ((None, tokens, channels), lambda b, s, t, d: (b, chunk(t), s * blocks + d)),
            "matrices": (
                (None, None, tokens, self.matrix_columns),
                lambda b, s, t, d: (b, s // self.strips_per_group, chunk(t), 0),
            ),
            "dmatrices": ((None, None, tokens, 2 * states), lambda b, s, t, d: (b, s, chunk(t), 0)),
            "rates": ((blocks, states, channels), lambda b, s, t, d: (s, 0, 0)),
            "channels": ((blocks, 1, channels), lambda b, s, t, d: (s, 0, 0)),
            "state": ((None, blocks, states, channels), lambda b, s, t, d: (b, s, 0, 0)),
            "rows": ((None, blocks, SUBLANES, channels), lambda b, s, t, d: (b, s, 0, 0)),
            "checkpoints": (
                (None, tokens // SPAN, None, states, channels),
                lambda b, s, t, d: (b, chunk(t), s * blocks + d, 0, 0),
            ),
        }[kind]
        return pl.BlockSpec(block_shape, index)
