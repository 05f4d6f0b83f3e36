"""Vectors of a chunk in the TPU kernels, with a number for each token of a head.

The kernels need rows, the same in all sublanes, and columns, the same in all lanes of the head.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common.tpu_tiles import LANES, Refs
from pallas_kernels.ssd.pallas_tpu.geometry import CHUNK, Geometry
from pallas_kernels.ssd.pallas_tpu.matrices import Scratch, by_head, head_lanes

# Parts of bfloat16 that a float32 is cut into: 8 bits of 24 each.
_PARTS = 3


def vector_scratch(geometry: Geometry) -> Scratch:
    """Memory for `turn_vectors` and `read_documents`, as shapes and dtypes."""
    wide, column = jnp.dtype(jnp.float32), (CHUNK, LANES)
    scratch: Scratch = {
        # Sums, as columns; and the scales, in parts of bfloat16 that add up to them.
        "columns": (column, wide),
        "parts": ((CHUNK, _PARTS * geometry.vector_rows), jnp.dtype(jnp.bfloat16)),
    }
    if geometry.packed:
        # 1 for tokens of the document that enters the chunk, and of the one that leaves it, else 0.
        scratch |= {"enters": (column, wide), "leaves": (column, wide)}
    return scratch


def read_documents(refs: Refs) -> jax.Array:
    """Whether two tokens are of one document; fills "enters" and "leaves"."""
    rows = jnp.broadcast_to(refs["documents"][...], (CHUNK, CHUNK))
    columns = rows.T
    refs["enters"][...] = jnp.where(columns == 0.0, 1.0, 0.0)
    refs["leaves"][...] = jnp.where(columns == columns[CHUNK - 1 :, :], 1.0, 0.0)
    return rows == columns


def turn_vectors(geometry: Geometry, refs: Refs) -> list[jax.Array]:
    """Turns the vectors of all heads of the block into columns; returns the scales of every tile, (CHUNK, LANES).

    Products leave a matrix unit in the order in which they enter it, so those of the scales, for which others wait,
    come first of all.
    """
    count = geometry.vector_rows
    scale, sums = refs["vectors"][:count, :], refs["vectors"][count:, :]
    parts = []
    for _ in range(_PARTS):
        parts.append(scale.astype(jnp.bfloat16).astype(jnp.float32))
        scale -= parts[-1]
    # Together, since a transposition takes as long for one row as for 128.
    columns = jnp.concatenate([*parts, sums], axis=0).T
    refs["parts"][...] = columns[:, : _PARTS * count].astype(jnp.bfloat16)
    refs["columns"][:, : columns.shape[1]] = columns
    return [_scales(geometry, refs, tile) for tile in range(geometry.tiles)]


def _scales(geometry: Geometry, refs: Refs, tile: int) -> jax.Array:
    """The scales of the heads of a tile, each in all lanes of its head, (CHUNK, LANES).

    The matrix units copy a number into all lanes faster than the unit for exchanges between lanes.
    """
    is_of_head = head_lanes(geometry, rows=geometry.vector_rows, first=tile * geometry.tile_heads)
    choice = jnp.concatenate([is_of_head] * _PARTS, axis=0).astype(jnp.bfloat16)
    # Both factors are bfloat16, whatever precision is JAX's default.
    precision = jax.lax.Precision.DEFAULT
    return jnp.dot(refs["parts"][...], choice, precision=precision, preferred_element_type=jnp.float32)


class TileDecays:
    """Decays of the heads of a tile, from the running sums of `decays.py`."""

    def __init__(self, geometry: Geometry, refs: Refs, tile: int):
        self._geometry, self._refs, self._first = geometry, refs, tile * geometry.tile_heads
        heads = range(geometry.tile_heads)
        self._columns = [[self._column(name, head) for name in geometry.vectors[1:]] for head in heads]

    def from_rows(self, head: int) -> jax.Array:
        """Between two tokens of a head of the tile, to that of the row from that of the column."""
        return _decays(self._columns[head], self._rows(head))

    def from_columns(self, head: int) -> jax.Array:
        """The same transposed: to the token of the column from that of the row."""
        return _decays(self._rows(head), self._columns[head])

    def edges(self) -> tuple[jax.Array, jax.Array]:
        """Of the state that enters to each token, and of each token to the end of the chunk, (CHUNK, LANES).

        Lanes are those of the tile's heads; behind the start of a document and before the last one decays are 0.
        """
        geometry, refs = self._geometry, self._refs
        parts = [by_head(geometry, columns) for columns in zip(*self._columns, strict=True)]
        enter = jnp.exp2(parts[0] + parts[1] if geometry.exact else parts[0])
        leave = _decays([part[CHUNK - 1 :, :] for part in parts], parts)
        return (enter * refs["enters"][...], leave * refs["leaves"][...]) if geometry.packed else (enter, leave)

    def _index(self, name: str, head: int) -> int:
        return self._geometry.vectors.index(name) * self._geometry.vector_rows + self._first + head

    def _rows(self, head: int) -> list[jax.Array]:
        starts = (self._index(name, head) for name in self._geometry.vectors[1:])
        return [self._refs["vectors"][start : start + 1, :] for start in starts]

    def _column(self, name: str, head: int) -> jax.Array:
        # The parts of the scales take the place of the scales.
        index = self._index(name, head) + (_PARTS - 1) * self._geometry.vector_rows
        return jnp.broadcast_to(self._refs["columns"][:, index : index + 1], (CHUNK, LANES))


def _decays(to: Sequence[jax.Array], since: Sequence[jax.Array]) -> jax.Array:
    """2^(s_i - s_j) from the "sum" and "rest" of both tokens; 1 instead of what is more, which does not count."""
    difference = to[0] - since[0]
    if len(to) > 1:
        difference += to[1] - since[1]
    return jnp.exp2(jnp.minimum(difference, 0.0))
