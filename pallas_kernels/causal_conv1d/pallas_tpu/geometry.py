"""Sizes of the TPU kernels of the causal convolution: how work is cut into blocks, and where they lie in arrays."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.rounding import round_up
from pallas_kernels.common.tpu_tiles import LANES, SPAN, SUBLANES, choose_tiles

# The most of a block.
TOKENS, TILES = 256, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a convolution as the kernels see it, padded to whole blocks.

    Attributes:
        batch, length, channels: B, L and E, padded.
        valid_length: tokens that exist.
        width: K.
        tokens, tiles: size of a block: tokens, and tiles of LANES channels.
    """

    batch: int
    length: int
    channels: int
    valid_length: int
    width: int
    tokens: int
    tiles: int

    @property
    def past(self) -> int:
        return self.width - 1

    @property
    def chunks(self) -> int:
        return self.length // self.tokens

    @property
    def spans(self) -> int:
        """Spans of SPAN tokens in a block."""
        return self.tokens // SPAN

    @property
    def grid(self) -> tuple[int, int, int]:
        """Batch, blocks of channels and chunks of tokens."""
        return self.batch, self.channels // (self.tiles * LANES), self.chunks

    @property
    def last_span(self) -> int:
        """The span of the whole sequence that has its last token."""
        return (self.valid_length - 1) // SPAN

    def shape(self, kind: str) -> tuple[int, ...]:
        """Shape of an array: x, the tokens before it or the first ones, its end, taps, sums for them, masks."""
        return {
            "sequence": (self.batch, self.length, self.channels),
            "before": (self.batch, SUBLANES, self.channels),
            "tail": (self.batch, 2 * SPAN, self.channels),
            "taps": (self.width + 1, self.channels),
            "sums": (self.batch, self.width + 1, SUBLANES, self.channels),
            "masks": (self.batch, self.length, 2 * self.past),
        }[kind]

    def spec(self, kind: str, *, is_reversed: bool) -> pl.BlockSpec:
        """The part of an array that a step of the grid (batch, block, chunk) sees."""
        lanes = self.tiles * LANES

        def chunk(step):
            return self.chunks - 1 - step if is_reversed else step

        block_shape, index = {
            "sequence": ((None, self.tokens, lanes), lambda b, e, t: (b, chunk(t), e)),
            "span before": (
                (None, SPAN, lanes),
                lambda b, e, t: (b, jnp.maximum(chunk(t) * self.spans - 1, 0), e),
            ),
            "before": ((None, SUBLANES, lanes), lambda b, e, t: (b, 0, e)),
            "tail": ((None, 2 * SPAN, lanes), lambda b, e, t: (b, 0, e)),
            "taps": ((self.width + 1, lanes), lambda b, e, t: (0, e)),
            "sums": ((None, self.width + 1, SUBLANES, lanes), lambda b, e, t: (b, 0, 0, e)),
            "masks": ((None, self.tokens, 2 * self.past), lambda b, e, t: (b, chunk(t), 0)),
        }[kind]
        return pl.BlockSpec(block_shape, index)


def choose_geometry(*, batch: int, length: int, channels: int, width: int) -> Geometry:
    """Chooses the sizes of blocks, and pads those of the convolution to whole blocks."""
    tokens = min(TOKENS, round_up(length, SPAN))
    channel_tiles = round_up(channels, LANES) // LANES
    tiles = choose_tiles(channel_tiles, most=TILES)
    return Geometry(
        batch=batch,
        length=round_up(length, tokens),
        channels=round_up(channel_tiles, tiles) * LANES,
        valid_length=length,
        width=width,
        tokens=tokens,
        tiles=tiles,
    )
