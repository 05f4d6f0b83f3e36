"""Sizes of linear attention with decay as the GPU kernels see it."""

import dataclasses

from pallas_kernels.common.rounding import ceil_div

# Tokens of a chunk, and channels of a head of the kernels: one warpgroup's tensor core instruction has 64 rows. A wider
# head is several of these, since the channels of a state are independent.
CHUNK = 64
WIDTH = 64
# A chunk's vectors; see `decays.py`. "start" is there only if documents are packed.
VECTORS = ("sum", "scale", "start")
# Multiprocessors of an H100; a block of the kernels fills one of them.
_PROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes; lengths, channels and states are padded to whole chunks and tiles.

    Values are (B L, H WIDTH), keys and queries (B L, G N), states (... H WIDTH, N), vectors (B H chunks, CHUNK), and
    starts (B chunks, CHUNK).

    Attributes:
        batch, heads, groups, states: B, H, G and N; heads have WIDTH channels.
        length: L, a multiple of CHUNK.
        packed: rows hold several documents, so vectors have their starts.
        parts: pieces of the sequence that the state walks at the same time.
    """

    batch: int
    heads: int
    groups: int
    states: int
    length: int
    packed: bool
    parts: int

    @property
    def chunks(self) -> int:
        return self.length // CHUNK

    @property
    def chunks_per_part(self) -> int:
        """Chunks of every part but the last, which may have fewer."""
        return ceil_div(self.chunks, self.parts)

    @property
    def group_heads(self) -> int:
        """Heads that share keys and queries."""
        return self.heads // self.groups

    @property
    def block_heads(self) -> int:
        """Heads that walk in one block, with one copy of keys and queries."""
        return 2 if self.group_heads % 2 == 0 else 1

    @property
    def vectors(self) -> tuple[str, ...]:
        return VECTORS if self.packed else VECTORS[:2]


def choose_parts(batch: int, heads: int, chunks: int) -> int:
    """Parts that fill the multiprocessors without a second round, each but the last of the same number of chunks."""
    blocks = ceil_div(batch * heads, 2)
    parts = max(1, min(_PROCESSORS // blocks, chunks))
    return ceil_div(chunks, ceil_div(chunks, parts))
