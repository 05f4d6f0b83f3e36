"""The forward kernel of linear attention with decay on TPUs: equations 11 to 13 of README.md, a chunk at a time."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.tpu_tiles import Refs, tile_lanes
from pallas_kernels.ssd.pallas_tpu.geometry import CHUNK, Geometry
from pallas_kernels.ssd.pallas_tpu.matrices import Scratch, by_head, indices, product, turned
from pallas_kernels.ssd.pallas_tpu.vectors import TileDecays, read_documents, turn_vectors, vector_scratch

# Whether chunks come from the last to the first.
IS_REVERSED = False


def scratch_shapes(geometry: Geometry) -> Scratch:
    """Shapes and dtypes of memory on the chip."""
    return {
        # Of all heads of the strip: q_i k_j, 0 where j > i, and k^T.
        "scores": ((CHUNK, CHUNK), jnp.dtype(jnp.float32)),
        "turned_k": ((geometry.states, CHUNK), geometry.dtype),
    } | vector_scratch(geometry)


def kernel(geometry: Geometry, refs: Refs) -> None:
    """Outputs of a block of heads and a chunk of tokens; the state stays in "final_state" from chunk to chunk."""
    chunk, block = pl.program_id(2), pl.program_id(3)

    @pl.when(chunk == 0)
    def _():
        first = refs["initial_state"][block] if "initial_state" in refs else 0.0
        refs["final_state"][block] = jnp.broadcast_to(first, refs["final_state"].shape[1:])

    @pl.when(block == 0)
    def _():
        query, key = indices()
        counts = (key <= query) & read_documents(refs) if geometry.packed else key <= query
        scores = product(geometry, refs["q"][...], refs["k"][...], transposed=True)
        refs["scores"][...] = jnp.where(counts, scores, 0.0)
        refs["turned_k"][...] = turned(refs["k"][...]).astype(geometry.dtype)

    scales = turn_vectors(geometry, refs)
    if "checkpoints" in refs:
        refs["checkpoints"][...] = refs["final_state"][block].astype(geometry.dtype)
    for tile, scale in enumerate(scales):
        _advance(geometry, refs, block, tile, scale)


def _advance(geometry: Geometry, refs: Refs, block: jax.Array, tile: int, scale: jax.Array) -> None:
    """Takes the heads of a tile through the chunk."""
    lanes, decays = tile_lanes(tile), TileDecays(geometry, refs, tile)
    v = refs["v"][:, lanes].astype(jnp.float32)
    gains = scale * v
    # Equation 11 and the sum of 12, head by head: a product has the width of a tile either way.
    weights = (refs["scores"][...] * decays.from_rows(head) for head in range(geometry.tile_heads))
    within = [product(geometry, each, gains) for each in weights]
    state = refs["final_state"][block, :, lanes]
    enter, leave = decays.edges()
    y = by_head(geometry, within) + enter * product(geometry, refs["q"][...], state)
    if "D" in refs:
        y += refs["D"][:, lanes] * v
    refs["y"][:, lanes] = y.astype(refs["y"].dtype)
    # Equation 13.
    added = product(geometry, refs["turned_k"][...], leave * gains)
    refs["final_state"][block, :, lanes] = enter[CHUNK - 1 :, :] * state + added
