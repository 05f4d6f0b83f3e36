"""Sizes of linear attention with decay as the TPU kernels see it: how work is cut into blocks, and where blocks lie."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.devices import entry_of_kind
from pallas_kernels.common.rounding import ceil_div, round_up
from pallas_kernels.common.tpu_tiles import LANES, SUBLANES, choose_tiles

# Tokens of a chunk: a vector of one number a token is a row of a register.
CHUNK = LANES
# Vectors of a head; see `decays.py`. "rest" is there only if products are in float32.
VECTORS = ("scale", "sum", "rest")
# Most heads of a block: the columns that `vectors.turn_vectors` makes of them fill the lanes of a register.
_MOST_HEADS = 24
# What the backward kernel writes of a head, see `backward.py`.
DVECTORS = ("between", "enter", "leave", "scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes, padded to whole blocks.

    The grid is (batch, strip, chunk, block), the last changing fastest. Heads lie side by side along lanes: those that
    share 128 lanes are a tile, several tiles a block, and the blocks that share keys and queries a strip: a group, or a
    piece of one. A head wider than a tile counts as several heads, since the channels of a state are independent.

    Attributes:
        batch, length: B and L, padded.
        groups: G.
        states: N, padded to whole tiles.
        pieces: heads that a head of the arguments is cut into.
        strips_per_group: pieces that a group is cut into.
        tile_heads: heads in a tile.
        tiles: tiles in a block.
        blocks: blocks of a strip.
        packed: rows hold several documents.
        exact: products are those of float32; otherwise operands are rounded to bfloat16.
    """

    batch: int
    length: int
    groups: int
    states: int
    pieces: int
    strips_per_group: int
    tile_heads: int
    tiles: int
    blocks: int
    packed: bool
    exact: bool

    @property
    def strips(self) -> int:
        return self.groups * self.strips_per_group

    @property
    def chunks(self) -> int:
        return self.length // CHUNK

    @property
    def width(self) -> int:
        """Lanes of a head."""
        return LANES // self.tile_heads

    @property
    def lanes(self) -> int:
        """Lanes of a block."""
        return self.tiles * LANES

    @property
    def heads(self) -> int:
        """Heads of a block."""
        return self.tiles * self.tile_heads

    @property
    def group_heads(self) -> int:
        """Heads of a group, with those that only fill its last block."""
        return self.strips_per_group * self.blocks * self.heads

    @property
    def dtype(self) -> jnp.dtype:
        """Of operands of products, and of the states that the backward kernel starts from."""
        return jnp.dtype(jnp.float32 if self.exact else jnp.bfloat16)

    @property
    def vectors(self) -> tuple[str, ...]:
        return VECTORS if self.exact else VECTORS[:-1]

    @property
    def vector_rows(self) -> int:
        """Rows of a vector of all heads: whole registers."""
        return round_up(self.heads, SUBLANES)

    @property
    def grid(self) -> tuple[int, ...]:
        return self.batch, self.strips, self.chunks, self.blocks

    def shape(self, kind: str) -> tuple[int, ...]:
        """Shape of an array: v, k, its gradient, vectors, their gradients, documents, D, a state, states of chunks."""
        of_block = self.batch, self.chunks, self.strips, self.blocks
        return {
            "values": (self.batch, self.length, self.strips * self.blocks * self.lanes),
            "keys": (self.batch, self.length, self.groups * self.states),
            "dkeys": (self.batch, self.length, self.strips * self.states),
            "vectors": (*of_block, len(self.vectors) * self.vector_rows, CHUNK),
            "dvectors": (*of_block, len(DVECTORS) * self.vector_rows, CHUNK),
            "documents": (self.batch, self.chunks, 1, CHUNK),
            "channels": (self.strips, self.blocks, 1, self.lanes),
            "rows": (self.batch, self.strips, self.blocks, SUBLANES, self.lanes),
            "state": (self.batch, self.strips, self.blocks, self.states, self.lanes),
            "checkpoints": (*of_block, self.states, self.lanes),
        }[kind]

    def spec(self, kind: str, *, is_reversed: bool) -> pl.BlockSpec:
        """The part of an array that a step of the grid sees; time runs backwards if `is_reversed`.

        The index of what belongs to a strip depends on neither chunk nor block, so Pallas fetches it once for the strip
        and writes it back once: states and sums over time stay on the chip in between.
        """

        def chunk(step):
            return self.chunks - 1 - step if is_reversed else step

        # The letters are the grid's: batch, strip, time (chunk), and d for the block.
        of_block = (None, None, None, None), lambda b, s, t, d: (b, chunk(t), s, d, 0, 0)
        of_strip = (None, None, self.blocks), lambda b, s, t, d: (b, s, 0, 0, 0)
        shape, index = {
            "values": ((None, CHUNK, self.lanes), lambda b, s, t, d: (b, chunk(t), s * self.blocks + d)),
            "keys": ((None, CHUNK, self.states), lambda b, s, t, d: (b, chunk(t), s // self.strips_per_group)),
            "dkeys": ((None, CHUNK, self.states), lambda b, s, t, d: (b, chunk(t), s)),
            "vectors": ((*of_block[0], len(self.vectors) * self.vector_rows, CHUNK), of_block[1]),
            "dvectors": ((*of_block[0], len(DVECTORS) * self.vector_rows, CHUNK), of_block[1]),
            "documents": ((None, None, 1, CHUNK), lambda b, s, t, d: (b, chunk(t), 0, 0)),
            "channels": ((None, None, 1, self.lanes), lambda b, s, t, d: (s, d, 0, 0)),
            "rows": ((*of_strip[0], SUBLANES, self.lanes), of_strip[1]),
            "state": ((*of_strip[0], self.states, self.lanes), of_strip[1]),
            "checkpoints": ((*of_block[0], self.states, self.lanes), of_block[1]),
        }[kind]
        return pl.BlockSpec(shape, index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What a generation of TPUs has room for.

    Attributes:
        tiles: largest number of tiles in a block.
        strip_bytes: largest size of a strip's state. It stays on the chip, as does its gradient.
        vmem_bytes: memory on the chip that a kernel may take.
        cores: number of cores that share a device's work.
    """

    tiles: int
    strip_bytes: int
    vmem_bytes: int
    cores: int


_V5E = Generation(tiles=12, strip_bytes=2**22, vmem_bytes=64 * 2**20, cores=1)
# By what `device.device_kind` contains; the first match counts, so "v5 lite" stands before "v5" (v5p).
GENERATIONS = {
    "v4": Generation(tiles=4, strip_bytes=2**20, vmem_bytes=15 * 2**20, cores=2),
    "v5 lite": _V5E,
    "v5": dataclasses.replace(_V5E, cores=2),
    "v6 lite": _V5E,
    "TPU7": _V5E,
}


def generation(device_kind: str) -> Generation:
    """The entry of a device by its kind, such as "TPU v5 lite"; of v5e if there is none."""
    return entry_of_kind(GENERATIONS, device_kind, default="v5 lite")


def choose_geometry(
    chip: Generation, *, batch: int, length: int, heads: int, groups: int, width: int, states: int, **flags: bool
) -> Geometry:
    """Chooses how heads are cut into blocks that fit on the chip, and pads sizes to whole blocks.

    Args:
        chip: what the chip has room for.
        batch: B.
        length: L.
        heads: H.
        groups: G.
        width: P.
        states: N.
        **flags: "packed" and "exact" of the geometry.

    Returns:
        The padded sizes and the blocks.
    """
    states = round_up(states, LANES)
    pieces = ceil_div(width, LANES)
    group_heads = heads // groups * pieces
    # As many heads in a tile as there is room for, or as there are, to a power of two.
    tile_heads = 1
    while 2 * tile_heads * width <= LANES and tile_heads < group_heads and tile_heads < SUBLANES:
        tile_heads *= 2
    tiles = ceil_div(group_heads, tile_heads)
    # As many strips as make their state fit, and work for every core.
    strips = max(
        ceil_div(tiles * states * LANES * 4, chip.strip_bytes), chip.cores if batch * groups % chip.cores else 1
    )
    tiles_of_strip = ceil_div(tiles, strips)
    # Products in float32 take six times the instructions; a third of the tiles keeps a kernel's code about as long.
    most = max(1, chip.tiles // 3) if flags["exact"] else chip.tiles
    tiles_of_block = choose_tiles(tiles_of_strip, most=min(most, _MOST_HEADS // tile_heads))
    blocks = ceil_div(tiles_of_strip, tiles_of_block)
    return Geometry(
        batch=batch,
        length=round_up(length, CHUNK),
        groups=groups,
        states=states,
        pieces=pieces,
        strips_per_group=ceil_div(tiles, blocks * tiles_of_block),
        tile_heads=tile_heads,
        tiles=tiles_of_block,
        blocks=blocks,
        **flags,
    )
