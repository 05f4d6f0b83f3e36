"""The backward kernel of linear attention with decay on TPUs: all gradients of a chunk, the last chunk first.

Matrices of pairs have the earlier token j along rows and the later token i along columns, which is how most products
need them. With W_ji = 2^(s_i - s_j) q_i k_j and S_ji = scale_j v_j dy_i for j <= i, else 0, the weights l ("leave") and
e ("enter") of `decays.py`, the state H before the chunk and the gradient G of the state after it:

    r_j  = sum_i W_ji dy_i + l_j G k_j,    dv_j = scale_j r_j + D dy_j
    dq_i = sum_j 2^(s_i - s_j) S_ji k_j + e_i H^T dy_i
    dk_j = sum_i 2^(s_i - s_j) S_ji q_i + scale_j l_j G^T v_j

The sums of both over the heads of a strip are made before the products with k_j and q_i. Of every head there are, for
equation 15 of README.md and the gradient of the scale,

    between  sum of W_ji S_ji over i >= k and j < k, of each token k
    enter    e_i dy_i H q_i; of the last token with e_T times the product of H and G besides
    leave    scale_j l_j v_j G k_j
    scale    v_j r_j
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.tpu_tiles import LANES, SUBLANES, Refs, tile_lanes
from pallas_kernels.ssd.pallas_tpu.geometry import CHUNK, DVECTORS, Geometry
from pallas_kernels.ssd.pallas_tpu.matrices import Scratch, by_head, head_lanes, indices, of_head, product, turned
from pallas_kernels.ssd.pallas_tpu.vectors import TileDecays, read_documents, turn_vectors, vector_scratch

# Whether chunks come from the last to the first.
IS_REVERSED = True


def scratch_shapes(geometry: Geometry) -> Scratch:
    """Shapes and dtypes of memory on the chip."""
    wide, of_pairs, of_keys = jnp.dtype(jnp.float32), (CHUNK, CHUNK), (CHUNK, geometry.states)
    return {
        # Of all heads of the strip: 1 for pairs that count, else 0; their q_i k_j, else 0; q^T; 1 for i >= k, else 0,
        # by i and k.
        "counts": (of_pairs, wide),
        "scores": (of_pairs, wide),
        "turned_q": ((geometry.states, CHUNK), geometry.dtype),
        "until": (of_pairs, geometry.dtype),
        # Sums over the heads of the strip: the gradient of q_i k_j, and what comes to q and k by the states.
        "dscores": (of_pairs, wide),
        "dq_of_states": (of_keys, wide),
        "dk_of_states": (of_keys, wide),
    } | vector_scratch(geometry)


def kernel(geometry: Geometry, refs: Refs) -> None:
    """Gradients of a block of heads and a chunk of tokens.

    The state's gradient stays in "dinitial_state" from chunk to chunk, and sums over heads in scratch memory until the
    last block of the strip.
    """
    # The index maps of the blocks turn time around: the first step of the grid sees the last chunk.
    step, block = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        refs["dinitial_state"][block] = refs["dfinal_state"][block]
        if "dD" in refs:
            refs["dD"][block] = jnp.zeros_like(refs["dD"][block])

    @pl.when(block == 0)
    def _():
        _enter(geometry, refs)

    for tile, scale in enumerate(turn_vectors(geometry, refs)):
        _go_back(geometry, refs, block, tile, scale)

    @pl.when(block == geometry.blocks - 1)
    def _():
        _leave(geometry, refs)


def _enter(geometry: Geometry, refs: Refs) -> None:
    """What all heads of the strip share."""
    q, k = refs["q"][...], refs["k"][...]
    key, query = indices()
    counts = (key <= query) & read_documents(refs) if geometry.packed else key <= query
    refs["counts"][...] = counts.astype(jnp.float32)
    refs["scores"][...] = jnp.where(counts, product(geometry, k, q, transposed=True), 0.0)
    refs["turned_q"][...] = turned(q).astype(geometry.dtype)
    # The row is i here, and the column k.
    refs["until"][...] = jnp.where(key >= query, 1.0, 0.0).astype(geometry.dtype)
    for name in ("dscores", "dq_of_states", "dk_of_states"):
        refs[name][...] = jnp.zeros_like(refs[name])


def _go_back(geometry: Geometry, refs: Refs, block: jax.Array, tile: int, scale: jax.Array) -> None:
    """All gradients of the heads of a tile; `scale` is that of its heads."""
    lanes, of_tile, heads = tile_lanes(tile), TileDecays(geometry, refs, tile), range(geometry.tile_heads)
    v, dy = (refs[name][:, lanes].astype(jnp.float32) for name in ("v", "dy"))
    gains = scale * v
    enter, leave = of_tile.edges()
    entering, leaving, decay = enter * dy, leave * gains, enter[CHUNK - 1 :, :]
    # Products leave a matrix unit in the order in which they enter it: those that wait for others come last.
    pairs = [product(geometry, gains, of_head(geometry, i, refs["dy"][:, lanes]), transposed=True) for i in heads]
    decays = [of_tile.from_columns(i) for i in heads]
    within = [product(geometry, refs["scores"][...] * each, refs["dy"][:, lanes]) for each in decays]
    state, dstate = refs["checkpoints"][:, lanes], refs["dinitial_state"][block, :, lanes]
    after = leave * product(geometry, refs["k"][...], dstate)
    entered = entering * product(geometry, refs["q"][...], state)
    refs["dq_of_states"][...] += product(geometry, entering, state, transposed=True)
    refs["dk_of_states"][...] += product(geometry, leaving, dstate, transposed=True)
    refs["dinitial_state"][block, :, lanes] = decay * dstate + product(geometry, refs["turned_q"][...], entering)
    for i in heads:
        _write_between(geometry, refs, tile * geometry.tile_heads + i, decays[i] * pairs[i])
    received = by_head(geometry, within) + after
    dv = scale * received
    if "D" in refs:
        dv += refs["D"][:, lanes] * dy
        refs["dD"][block, :, lanes] += _folded(dy * v)
    refs["dv"][:, lanes] = dv.astype(refs["dv"].dtype)
    of_chunk = decay * jnp.sum(dstate * state.astype(jnp.float32), axis=0, keepdims=True)
    _write_sums(geometry, refs, tile, "enter", _with_last(entered, of_chunk))
    _write_sums(geometry, refs, tile, "leave", gains * after)
    _write_sums(geometry, refs, tile, "scale", v * received)


def _write_between(geometry: Geometry, refs: Refs, head: int, decayed: jax.Array) -> None:
    """Writes "between" of a head from 2^(s_i - s_j) S_ji, and adds this to "dscores"."""
    refs["dscores"][...] += decayed
    earlier, token = indices()
    around = product(geometry, refs["scores"][...] * decayed, refs["until"][...])
    around = jnp.where(earlier < token, around, 0.0)
    refs["dvectors"][_rows(geometry, "between", head, 1), :] = jnp.sum(around, axis=0, keepdims=True)


def _write_sums(geometry: Geometry, refs: Refs, tile: int, name: str, terms: jax.Array) -> None:
    """Writes the sums of a tile's terms over the lanes of each head, by a product that makes rows of them."""
    sums = product(geometry, head_lanes(geometry, rows=2 * SUBLANES), terms, transposed=True)
    count = geometry.tile_heads
    refs["dvectors"][_rows(geometry, name, tile * count, count), :] = sums[:count]


def _rows(geometry: Geometry, name: str, head: int, count: int) -> slice:
    """Where the gradients of a vector of some heads of the block go."""
    first = DVECTORS.index(name) * geometry.vector_rows + head
    return slice(first, first + count)


def _with_last(rows: jax.Array, more: jax.Array) -> jax.Array:
    """Adds a row to the last one."""
    index = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    last = rows[CHUNK - SUBLANES :] + jnp.where(index == SUBLANES - 1, more, 0.0)
    return jnp.concatenate([rows[: CHUNK - SUBLANES], last], axis=0)


def _folded(rows: jax.Array) -> jax.Array:
    """Adds the rows of a chunk to those of one register."""
    return jnp.sum(rows.reshape(-1, SUBLANES, LANES), axis=0)


def _leave(geometry: Geometry, refs: Refs) -> None:
    """Writes the gradients of q and k, now that all heads of the strip have added theirs."""
    dscores = refs["counts"][...] * refs["dscores"][...]
    q, k = refs["q"][...], refs["k"][...]
    dq = refs["dq_of_states"][...] + product(geometry, dscores.T, k)
    dk = refs["dk_of_states"][...] + product(geometry, dscores, q)
    refs["dq"][...] = dq.astype(refs["dq"].dtype)
    refs["dk"][...] = dk.astype(refs["dk"].dtype)
