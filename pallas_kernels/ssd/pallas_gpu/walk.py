"""The kernel that takes the states of heads through a sequence, chunk by chunk, forwards or backwards.

A block walks one or two heads of a group, a warpgroup each, and one more warpgroup copies what they read. The state
stays in registers in float32. For the tensor cores it is rounded to bfloat16: once a chunk, when it is read.
"""

import dataclasses
import functools
from typing import Any

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
    multiply,
    read,
    tile,
    zeros,
)

# Chunks that are copied ahead: as many as fit into shared memory, with and without queries.
_STAGES = {True: 3, False: 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """What a walk computes.

    Attributes:
        weight: "enter" or "leave" of `decays.ends`, which weighs a token's share of the state.
        reverse: from the last chunk to the first.
        outputs: compute y, which takes queries.
        checkpoints: write the state before every chunk, in bfloat16.
    """

    weight: str
    reverse: bool = False
    outputs: bool = False
    checkpoints: bool = False

    @property
    def stages(self) -> int:
        return _STAGES[self.outputs]


def walk(geometry: Geometry, kind: Walk, inputs: Arrays, *, interpreted: bool) -> Arrays:
    """Runs the kernel.

    Args:
        geometry: sizes.
        kind: what to compute.
        inputs: "v" (B L, H WIDTH), "k" and, for outputs, "q" (B L, G N), and the vectors. "initial"
            (parts B H WIDTH, N), what the parts start from, is zero if it is missing; so is "D" (H, WIDTH), the skip.
        interpreted: run in Pallas' interpreter.

    Returns:
        "final" (parts B H WIDTH, N), the state after each part, "y" like "v", and "checkpoints"
        (B chunks H WIDTH, N). A walk with neither outputs nor checkpoints leaves out its last part.
    """
    rows, states = geometry.batch * geometry.heads * WIDTH, geometry.states
    outputs = {"final": jax.ShapeDtypeStruct((geometry.parts * rows, states), jnp.float32)}
    count = geometry.block_heads
    copies = count * (1 + len(geometry.vectors)) + 1 + kind.outputs
    scratch: dict[str, Any] = {
        "vs": tile(kind.stages, count, CHUNK, WIDTH),
        "ks": tile(kind.stages, CHUNK, states),
        "vector": plgpu.SMEM((kind.stages, count, len(geometry.vectors), CHUNK), jnp.float32),
        "weighted": tile(count, CHUNK, WIDTH),
        "skip": plgpu.SMEM((count, WIDTH), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=kind.stages),
        "empty": plgpu.Barrier(num_arrivals=count, num_barriers=kind.stages),
    }
    if kind.outputs:
        outputs["y"] = jax.ShapeDtypeStruct(inputs["v"].shape, inputs["v"].dtype)
        scratch |= {"qs": tile(kind.stages, CHUNK, states), "ys": tile(count, CHUNK, WIDTH)}
        scratch["state"] = tile(count, 1, WIDTH, states)
    if kind.checkpoints:
        outputs["checkpoints"] = jax.ShapeDtypeStruct((geometry.chunks * rows, states), jnp.bfloat16)
        scratch["state"] = tile(count, 2, WIDTH, states)
    return launch(
        functools.partial(_kernel, geometry, kind, interpreted),
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        grid={
            "batch": geometry.batch,
            "part": geometry.parts,
            "block": geometry.heads // count,
            "warpgroup": count + 1,
        },
        name="ssd_walk_back" if kind.reverse else "ssd_walk",
        interpreted=interpreted,
    )


def _kernel(geometry: Geometry, kind: Walk, interpreted: bool, refs: Arrays) -> None:
    """A block: its heads of one row of the batch through one part of the sequence."""
    part, warpgroup = jax.lax.axis_index("part"), jax.lax.axis_index("warpgroup")
    first = part * geometry.chunks_per_part
    count = jnp.minimum(geometry.chunks - first, geometry.chunks_per_part)
    if not (kind.outputs or kind.checkpoints):
        # Such a walk is for the states between parts: nothing comes after the last one.
        last = 0 if kind.reverse else geometry.parts - 1
        count = jnp.where(part == last, 0, count)

    def chunk(i):
        return first + (count - 1 - i if kind.reverse else i)

    @pl.when(warpgroup < geometry.block_heads)
    def _():
        take_registers(geometry.block_heads)
        _Head(geometry, kind, interpreted, refs).run(count, chunk)

    @pl.when(warpgroup == geometry.block_heads)
    def _():
        give_registers(geometry.block_heads)
        _copy_ahead(geometry, kind, refs, count, chunk)


def _copy_ahead(geometry: Geometry, kind: Walk, refs: Arrays, count, chunk) -> None:
    """Copies what the heads read, as soon as they have left its place."""
    batch, block = jax.lax.axis_index("batch"), jax.lax.axis_index("block")
    head = block * geometry.block_heads
    group = jax.lax.div(head, geometry.group_heads)

    def fetch(i, slot, barrier):
        tokens = pl.ds((batch * geometry.chunks + chunk(i)) * CHUNK, CHUNK)
        columns = pl.ds(group * geometry.states, geometry.states)
        plgpu.copy_gmem_to_smem(refs["k"].at[tokens, columns], refs["ks"].at[slot], barrier)
        if kind.outputs:
            plgpu.copy_gmem_to_smem(refs["q"].at[tokens, columns], refs["qs"].at[slot], barrier)
        for j in range(geometry.block_heads):
            channels = pl.ds((head + j) * WIDTH, WIDTH)
            plgpu.copy_gmem_to_smem(refs["v"].at[tokens, channels], refs["vs"].at[slot, j], barrier)
            copy_vectors(geometry, refs, (batch, head + j, chunk(i)), refs["vector"].at[slot, j], barrier)

    copy_ahead(count, kind.stages, refs, fetch)


class _Head:
    """A warpgroup: one head."""

    def __init__(self, geometry: Geometry, kind: Walk, interpreted: bool, refs: Arrays):
        self.geometry, self.kind, self.interpreted, self.refs = geometry, kind, interpreted, refs
        self.batch = jax.lax.axis_index("batch")
        self.own = jax.lax.axis_index("warpgroup")
        self.head = jax.lax.axis_index("block") * geometry.block_heads + self.own

    def run(self, count, chunk) -> None:
        """Walks through `count` chunks, the i-th of which is chunk(i)."""
        geometry, refs = self.geometry, self.refs
        part = jax.lax.axis_index("part")
        place = pl.ds(((part * geometry.batch + self.batch) * geometry.heads + self.head) * WIDTH, WIDTH)
        state = zeros(WIDTH, geometry.states)
        if "initial" in refs:
            state = plgpu.load(refs["initial"].at[place], layout=MATRIX, optimized=False)
        if "D" in refs:
            # In registers it would be alive during the products, which need them all.
            refs["skip"].at[self.own][...] = plgpu.load(refs["D"].at[self.head], layout=COLUMNS, optimized=False)

        def advance(i, state):
            slot, _ = ring_slot(i, self.kind.stages)
            plgpu.barrier_wait(refs["full"].at[slot])
            state = self.advance(i, chunk(i), slot, state)
            plgpu.barrier_arrive(refs["empty"].at[slot])
            return state

        refs["final"][place] = jax.lax.fori_loop(0, count, advance, state)
        plgpu.wait_smem_to_gmem(0)

    def vectors(self, slot) -> ChunkVectors:
        """The chunk's vectors."""
        return ChunkVectors(self.refs["vector"].at[slot, self.own], packed=self.geometry.packed)

    def values(self, slot) -> jax.Array:
        """The chunk's v."""
        return plgpu.load(self.refs["vs"].at[slot, self.own], layout=MATRIX).astype(jnp.float32)

    def advance(self, i, chunk, slot, state: jax.Array) -> jax.Array:
        """Writes what the chunk, the i-th, has to give; returns the state after it."""
        geometry, kind, refs = self.geometry, self.kind, self.refs
        weighted = refs["weighted"].at[self.own]
        vectors = self.vectors(slot)
        rounded, decay = state.astype(jnp.bfloat16), vectors.decay()
        weights = vectors.enter() if kind.weight == "enter" else vectors.leave()
        shares = (self.values(slot) * by_row(weights, WIDTH)).astype(jnp.bfloat16)
        if kind.outputs:
            return self.with_outputs(chunk, slot, (rounded, state * decay), shares)
        weighted[...] = shares
        # Two places: the state before the last chunk may still be on its way out.
        state_tile = refs["state"].at[self.own, jax.lax.rem(i, 2)] if kind.checkpoints else None
        if state_tile is not None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            state_tile[...] = rounded
        plgpu.commit_smem()
        if state_tile is not None:
            place = ((self.batch * geometry.chunks + chunk) * geometry.heads + self.head) * WIDTH
            plgpu.copy_smem_to_gmem(state_tile, refs["checkpoints"].at[pl.ds(place, WIDTH)])

        def update(state):
            multiply(state, weighted, refs["ks"].at[slot], transposed="a")

        (state,) = accumulate(update, (state * decay,), interpreted=self.interpreted)
        return state

    def with_outputs(self, chunk, slot, states, shares: jax.Array) -> jax.Array:
        """Writes y of the chunk and returns the state after it.

        Args:
            chunk: its index.
            slot: place of what has been copied of it.
            states: the state before the chunk in bfloat16, and decayed by the chunk in float32.
            shares: v weighted by its shares of the state, in bfloat16.
        """
        geometry, refs = self.geometry, self.refs
        k_tile, q_tile = refs["ks"].at[slot], refs["qs"].at[slot]
        weighted, state_tile = refs["weighted"].at[self.own], refs["state"].at[self.own, 0]
        rounded, decayed = states
        vectors = self.vectors(slot)

        def products(scores, before, state, within):
            multiply(scores, q_tile, k_tile, transposed="b")
            # The copies in shared memory are made while the first product runs, and the decays of pairs while the next
            # two do.
            weighted[...] = shares
            state_tile[...] = rounded
            plgpu.commit_smem()
            multiply(before, q_tile, state_tile, transposed="b")
            multiply(state, weighted, k_tile, transposed="a")
            decays = pair_decays(vectors) * by_column(vectors.load("scale", COLUMNS), CHUNK)
            weights = (read(scores, running=2) * decays).astype(jnp.bfloat16)
            multiply(within, weights, refs["vs"].at[slot, self.own])

        square, wide = zeros(CHUNK, CHUNK), zeros(CHUNK, WIDTH)
        results = accumulate(products, (square, wide, decayed, wide), interpreted=self.interpreted)
        _, before, state, within = results
        y = before * by_row(vectors.enter(), WIDTH) + within
        if "D" in refs:
            y = y + self.values(slot) * by_column(plgpu.load(refs["skip"].at[self.own], layout=COLUMNS), CHUNK)
        # y of the last chunk must have left its place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs["ys"].at[self.own][...] = y.astype(jnp.bfloat16)
        plgpu.commit_smem()
        tokens = pl.ds((self.batch * geometry.chunks + chunk) * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(refs["ys"].at[self.own], refs["y"].at[tokens, pl.ds(self.head * WIDTH, WIDTH)])
        return state


def copy_vectors(geometry: Geometry, refs: Arrays, place, target, barrier) -> None:
    """Starts the copies of the vectors of a chunk, which arrive on the barrier one by one.

    Args:
        geometry: sizes.
        refs: with the vectors.
        place: row of the batch, head and chunk.
        target: shared memory, (V, CHUNK).
        barrier: of the copies.
    """
    batch, head, chunk = place
    for index, name in enumerate(geometry.vectors):
        # All heads have the same starts.
        leading = batch if name == "start" else batch * geometry.heads + head
        plgpu.copy_gmem_to_smem(refs[name].at[leading * geometry.chunks + chunk], target.at[index], barrier)


def pair_decays(vectors: ChunkVectors) -> jax.Array:
    """2^(s_i - s_j) for every row i and column j, 0 where token j is later than i or of another document."""
    i, j = token_indices()
    visible = i >= j
    if vectors.packed:
        visible = visible & (j.astype(jnp.float32) >= by_row(vectors.load("start"), CHUNK))
    difference = by_row(vectors.load("sum"), CHUNK) - by_column(vectors.load("sum", COLUMNS), CHUNK)
    # The mask comes before the exponential: a difference that it hides may be large.
    return jnp.exp2(jnp.where(visible, difference, -jnp.inf))


def token_indices() -> tuple[jax.Array, jax.Array]:
    """The tokens i and j of a matrix of all pairs."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=MATRIX) for axis in range(2))
    return i, j
