"""The kernel that computes the gradients of a chunk from the states before it and the gradient of the state after it.

A block has one chunk of one group and goes through the group's heads, so that the gradients of keys and queries, sums
over heads, stay in registers. One warpgroup works on pairs of tokens of the chunk, one on what comes from and goes to
the other chunks, and one copies what they read.

With W_ij = 2^(s_i - s_j) q_i k_j and S_ij = dy_i v_j for j <= i, else 0, the weights w ("leave") and e ("enter") of
`decays.py`, the state H before the chunk and the gradient G of the state after it:

    dv_j = scale_j sum_i W_ij dy_i + w_j G k_j + D dy_j
    dq_i = sum_j 2^(s_i - s_j) scale_j S_ij k_j + e_i H^T dy_i
    dk_j = sum_i 2^(s_i - s_j) scale_j S_ij q_i + w_j G^T v_j
    de_i = dy_i H q_i,    dw_j = v_j G k_j,    dscale_j = sum_i W_ij S_ij
    ds_i = sum_j<i W_ij S_ij scale_j - scale_i sum_j>i W_ji S_ji
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.pallas_gpu.decays import ChunkVectors
from pallas_kernels.ssd.pallas_gpu.geometry import CHUNK, WIDTH, Geometry
from pallas_kernels.ssd.pallas_gpu.launching import (
    Arrays,
    copy_ahead,
    give_registers,
    launch,
    ring_slot,
    take_registers,
)
from pallas_kernels.ssd.pallas_gpu.tensor_cores import (
    COLUMNS,
    MATRIX,
    accumulate,
    by_column,
    by_row,
    from_zero,
    multiply,
    read,
    row_sums,
    tile,
    zeros,
)
from pallas_kernels.ssd.pallas_gpu.walk import copy_vectors, pair_decays, token_indices

# Heads that are copied ahead.
_STAGES = 3
# Warpgroups by what they do.
_PAIRS, _STATES, _COPIES = range(3)
# Rows of the gradients of a head's vectors, and which warpgroup writes them. "skip" is v_i dy_i, "state" the product
# H G of each channel of the state.
PAIR_ROWS = ("sum", "scale", "leave")
STATE_ROWS = ("enter", "skip", "state")


def gradients(geometry: Geometry, inputs: Arrays, *, interpreted: bool) -> Arrays:
    """Runs the kernel.

    Args:
        geometry: sizes.
        inputs: "v", "dy" (B L, H WIDTH), "k", "q" (B L, G N), the vectors, "states" and "dstates"
            (B chunks H WIDTH, N), the checkpoints of both walks, and "D" (H, WIDTH) if there is a skip.
        interpreted: run in Pallas' interpreter.

    Returns:
        "dv", "dk", "dq" like v, k and q, "pair_rows" and "state_rows" (B chunks H 3, CHUNK) with the rows above.
    """
    states = geometry.states
    rows = geometry.batch * geometry.chunks * geometry.heads * 3
    outputs = {f"d{name}": jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype) for name in ("v", "k", "q")}
    outputs |= {name: jax.ShapeDtypeStruct((rows, CHUNK), jnp.float32) for name in ("pair_rows", "state_rows")}
    copies = 4 + len(geometry.vectors) + ("D" in inputs)
    scratch = {
        "ks": tile(CHUNK, states),
        "qs": tile(CHUNK, states),
        "vs": tile(_STAGES, CHUNK, WIDTH),
        "dys": tile(_STAGES, CHUNK, WIDTH),
        "state": tile(_STAGES, WIDTH, states),
        "dstate": tile(_STAGES, WIDTH, states),
        "vector": plgpu.SMEM((_STAGES, len(geometry.vectors), CHUNK), jnp.float32),
        "skip": plgpu.SMEM((_STAGES, WIDTH), jnp.float32),
        "weights": tile(CHUNK, CHUNK),
        "dvs": tile(CHUNK, WIDTH),
        "pair": plgpu.SMEM((3, CHUNK), jnp.float32),
        "carried": plgpu.SMEM((3, CHUNK), jnp.float32),
        "matrices": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=_STAGES),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        "summed": plgpu.Barrier(),
    }
    return launch(
        functools.partial(_kernel, geometry, interpreted),
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        grid={"batch": geometry.batch, "chunk": geometry.chunks, "group": geometry.groups, "warpgroup": 3},
        name="ssd_gradients",
        interpreted=interpreted,
    )


def _kernel(geometry: Geometry, interpreted: bool, refs: Arrays) -> None:
    """A block: one chunk of a row of the batch, the heads of one group."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == _PAIRS)
    def _():
        take_registers(_COPIES)
        _Pairs(geometry, interpreted, refs).run()

    @pl.when(warpgroup == _STATES)
    def _():
        take_registers(_COPIES)
        _States(geometry, interpreted, refs).run()

    @pl.when(warpgroup == _COPIES)
    def _():
        give_registers(_COPIES)
        _Place(geometry, refs).copy_ahead()


class _Place:
    """Where in the arrays a block works."""

    def __init__(self, geometry: Geometry, refs: Arrays):
        self.geometry, self.refs = geometry, refs
        self.group = jax.lax.axis_index("group")
        self.chunk = jax.lax.axis_index("batch") * geometry.chunks + jax.lax.axis_index("chunk")
        self.tokens = pl.ds(self.chunk * CHUNK, CHUNK)
        self.columns = pl.ds(self.group * geometry.states, geometry.states)

    def head(self, i):
        """The group's i-th head."""
        return self.group * self.geometry.group_heads + i

    def channels(self, i):
        return pl.ds(self.head(i) * WIDTH, WIDTH)

    def rows(self, i):
        """Of the gradients of a head's vectors."""
        return pl.ds((self.chunk * self.geometry.heads + self.head(i)) * 3, 3)

    def copy_ahead(self) -> None:
        """Copies keys and queries, and then what belongs to each head, as soon as the others have left its place."""
        geometry, refs = self.geometry, self.refs
        for name in ("k", "q"):
            matrix = refs[name].at[self.tokens, self.columns]
            plgpu.copy_gmem_to_smem(matrix, refs[name + "s"], refs["matrices"])

        def fetch(i, slot, barrier):
            for source, target in (("v", "vs"), ("dy", "dys")):
                values = refs[source].at[self.tokens, self.channels(i)]
                plgpu.copy_gmem_to_smem(values, refs[target].at[slot], barrier)
            rows = pl.ds((self.chunk * geometry.heads + self.head(i)) * WIDTH, WIDTH)
            for source, target in (("states", "state"), ("dstates", "dstate")):
                plgpu.copy_gmem_to_smem(refs[source].at[rows], refs[target].at[slot], barrier)
            batch, chunk = jax.lax.axis_index("batch"), jax.lax.axis_index("chunk")
            copy_vectors(geometry, refs, (batch, self.head(i), chunk), refs["vector"].at[slot], barrier)
            if "D" in refs:
                plgpu.copy_gmem_to_smem(refs["D"].at[self.head(i)], refs["skip"].at[slot], barrier)

        copy_ahead(geometry.group_heads, _STAGES, refs, fetch)


class _Worker:
    """What both warpgroups that compute have."""

    def __init__(self, geometry: Geometry, interpreted: bool, refs: Arrays):
        self.geometry, self.interpreted, self.refs = geometry, interpreted, refs
        self.place = _Place(geometry, refs)

    def vectors(self, slot) -> ChunkVectors:
        """The chunk's vectors of a head."""
        return ChunkVectors(self.refs["vector"].at[slot], packed=self.geometry.packed)

    def tokens(self, name: str, slot) -> jax.Array:
        """Values of the tokens of a head."""
        return plgpu.load(self.refs[name].at[slot], layout=MATRIX).astype(jnp.float32)

    def over_heads(self, body, carry):
        """Calls carry = body(i, slot, carry) for every head of the group, whose arrays are in a slot."""

        def advance(i, carry):
            slot, _ = ring_slot(i, _STAGES)
            plgpu.barrier_wait(self.refs["full"].at[slot])
            carry = body(i, slot, carry)
            plgpu.barrier_arrive(self.refs["empty"].at[slot])
            return carry

        return jax.lax.fori_loop(0, self.geometry.group_heads, advance, carry)

    def accumulate(self, body, *starts):
        return accumulate(body, starts, interpreted=self.interpreted)


class _Pairs(_Worker):
    """Pairs of tokens of the chunk: dv, and the sums over heads of the gradients of q_i k_j."""

    def run(self) -> None:
        """Computes q_i k_j once for all heads of the group, and has each head write its share.

        Leaves the heads' sum of the gradients of q_i k_j in "weights", (CHUNK, CHUNK) in bfloat16, for `_States`.
        """
        refs = self.refs
        plgpu.barrier_wait(refs["matrices"])

        def multiply_all(scores):
            multiply(scores, refs["qs"], refs["ks"], transposed="b")

        (scores,) = self.accumulate(multiply_all, zeros(CHUNK, CHUNK))
        query, key = token_indices()
        # A token with itself has no decay. Apart, its large share does not have to cancel in the gradient of the sums.
        scores, own = jnp.where(query > key, scores, 0.0), row_sums(jnp.where(query == key, scores, 0.0))
        total = self.over_heads(functools.partial(self.head, scores, own), zeros(CHUNK, CHUNK))
        refs["weights"][...] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs["summed"])
        plgpu.wait_smem_to_gmem(0)

    def head(self, scores: jax.Array, own: jax.Array, i, slot, total: jax.Array) -> jax.Array:
        """Writes what belongs to a head.

        Args:
            scores: q_i k_j for j < i, else 0.
            own: q_i k_i.
            i: the head's index in the group.
            slot: place of what has been copied of it.
            total: the sum so far of the gradients of q_i k_j; returned with the head's share.
        """
        refs = self.refs
        v_tile, dy_tile, vectors = refs["vs"].at[slot], refs["dys"].at[slot], self.vectors(slot)

        def within_chunk(pairs):
            multiply(pairs, dy_tile, v_tile, transposed="b")
            # Everything but the product itself is computed while it runs.
            decays = pair_decays(vectors)
            weights = (scores * decays).astype(jnp.bfloat16)
            refs["weights"][...] = weights
            plgpu.commit_smem()
            scaled = read(pairs) * by_column(vectors.load("scale", COLUMNS), CHUNK)
            return total + scaled * decays, row_sums(weights.astype(jnp.float32) * scaled)

        total, received = from_zero(within_chunk, ((CHUNK, CHUNK),), interpreted=self.interpreted)

        def values(within, after):
            multiply(within, refs["weights"], dy_tile, transposed="a")
            multiply(after, refs["ks"], refs["dstate"].at[slot], transposed="b")

        within, after = self.accumulate(values, zeros(CHUNK, WIDTH), zeros(CHUNK, WIDTH))
        v, dy = self.tokens("vs", slot), self.tokens("dys", slot)
        scale, leave = vectors.load("scale"), vectors.leave()
        given = row_sums(v * within)
        within = within + dy * by_row(own, WIDTH)
        dv = within * by_row(scale, WIDTH) + after * by_row(leave, WIDTH)
        if "D" in refs:
            dv = dv + dy * by_column(plgpu.load(refs["skip"].at[slot], layout=COLUMNS), CHUNK)
        # What the last head has written must have left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs["dvs"][...] = dv.astype(jnp.bfloat16)
        for index, values in enumerate((received - scale * given, row_sums(v * within), row_sums(v * after))):
            refs["pair"].at[index][...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs["dvs"], refs["dv"].at[self.place.tokens, self.place.channels(i)])
        plgpu.copy_smem_to_gmem(refs["pair"], refs["pair_rows"].at[self.place.rows(i)])
        return total


class _States(_Worker):
    """What comes from the state before the chunk and goes to the state after it: dq and dk."""

    def run(self) -> None:
        """Writes dq and dk of the chunk and group, (CHUNK, N) each in bfloat16.

        Shares of the states come first, head by head; then those of the pairs, once `_Pairs` has summed them in
        "weights". After that nobody reads the tiles of q and k in shared memory, and the gradients leave through them.
        """
        refs, states = self.refs, self.geometry.states
        plgpu.barrier_wait(refs["matrices"])
        dq, dk = self.over_heads(self.head, (zeros(CHUNK, states), zeros(CHUNK, states)))
        plgpu.barrier_wait(refs["summed"])

        def pairs(dq, dk):
            multiply(dq, refs["weights"], refs["ks"])
            multiply(dk, refs["weights"], refs["qs"], transposed="a")

        dq, dk = self.accumulate(pairs, dq, dk)
        for name, gradient in (("q", dq), ("k", dk)):
            refs[name + "s"][...] = gradient.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for name in ("q", "k"):
            plgpu.copy_smem_to_gmem(refs[name + "s"], refs["d" + name].at[self.place.tokens, self.place.columns])
        plgpu.wait_smem_to_gmem(0)

    def head(self, i, slot, carry):
        """Writes what belongs to a head; returns dq and dk with its share."""
        refs = self.refs
        state_tile, dstate_tile = refs["state"].at[slot], refs["dstate"].at[slot]
        v, dy = (self.tokens(name, slot) for name in ("vs", "dys"))
        skip = row_sums(dy * v)
        entering = (dy * by_row(self.vectors(slot).enter(), WIDTH)).astype(jnp.bfloat16)
        leaving = (v * by_row(self.vectors(slot).leave(), WIDTH)).astype(jnp.bfloat16)

        def products(read, dq, dk):
            multiply(read, refs["qs"], state_tile, transposed="b")
            multiply(dq, entering, state_tile)
            multiply(dk, leaving, dstate_tile)

        read, dq, dk = self.accumulate(products, zeros(CHUNK, WIDTH), *carry)
        # Read again, so that they take no registers meanwhile.
        enter = row_sums(self.tokens("dys", slot) * read)
        sums = enter, skip, self.state_products(state_tile, dstate_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for index, values in enumerate(sums):
            refs["carried"].at[index][...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs["carried"], refs["state_rows"].at[self.place.rows(i)])
        return dq, dk

    def state_products(self, state_tile, dstate_tile) -> jax.Array:
        """H G of each channel of the state."""
        # One tile of columns at a time, for want of registers.
        sums = []
        for first in range(0, self.geometry.states, CHUNK):
            columns = pl.ds(first, CHUNK)
            state, dstate = (
                plgpu.load(each.at[:, columns], layout=MATRIX).astype(jnp.float32) for each in (state_tile, dstate_tile)
            )
            sums.append(row_sums(state * dstate))
        return functools.reduce(jnp.add, sums)
