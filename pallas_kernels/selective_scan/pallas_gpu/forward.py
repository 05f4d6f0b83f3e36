"""The forward kernel of the selective scan on NVIDIA GPUs (Hopper and newer); docs/kernels.md explains it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.register_math import Registers, added, loop, sigmoid, total
from pallas_kernels.common.warpgroup import Warpgroup, widen
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, SLICE, SPAN, Geometry, common_scratch, value_slots
from pallas_kernels.selective_scan.pallas_gpu.kernel import Kernel


def scratch_types(geometry: Geometry) -> dict[str, Any]:
    """Shared memory of a block, in float32."""
    channels = geometry.tiling.channels_per_block
    return common_scratch(geometry.tiling) | {
        "sums": plgpu.SMEM((value_slots(geometry.tiling),), jnp.float32),
        "states": plgpu.SMEM((geometry.slices * channels * SLICE,), jnp.float32),
    }


def kernel(
    geometry: Geometry, features: Features, w: Warpgroup, inputs: dict[str, Any], outputs: dict[str, Any], shared
) -> None:
    """Runs a block: its channels of one batch row, through one part of the sequence.

    Args:
        geometry: sizes.
        features: what is done.
        w: the warpgroup.
        inputs: references "x", "dt", "z" (B L, G F), "B", "C" (B L, G N), "A" (G F, N), "D", "dt_bias"
            (1, G F), "starts" (B L, 1), "initial_state" (B G F, N); the optional ones if present. If the sequence is in
            parts, "part_states" (parts B G F, N) and "part_steps" (parts B G F, 1) of `pallas_gpu_parts`.
        outputs: "y" (B L, G F), "final_state" (B G F, N) and, if wanted, "checkpoints" (B chunks G F, N).
        shared: see `scratch_types`.
    """
    _Forward(geometry, features, w, inputs, outputs, shared).run()


class _Forward(Kernel):
    def run(self) -> None:
        part = jax.lax.axis_index("part")
        first = part * self.geometry.chunks_per_part
        stop = jnp.minimum(first + self.geometry.chunks_per_part, self.geometry.chunks)
        self.last_chunk = self.geometry.chunks - 1
        self.keep_constants()
        self.over_slices(lambda slice_index: self.initialise(part, slice_index))
        if self.single:
            self.rates = self.load_rates(0)

        words = self.fetch(first)
        self.enter(first, words)
        loop(first, stop, self.walk_chunk, self.kept(words))

        @pl.when(part == self.tiling.parts - 1)
        def _():
            self.over_slices(self.write_final_state)

    def initialise(self, part, slice_index) -> None:
        states = self.zeros()
        if "initial_state" in self.inputs:
            states = self.load_states("initial_state", self.place.batch, slice_index)
        if self.tiling.parts > 1:
            rates = self.load_rates(slice_index)
            states = self.carried(states, 0, part, rates, slice_index)
        self.store_shared_states("states", slice_index, states)

    def write_final_state(self, slice_index) -> None:
        states = self.load_shared_states("states", slice_index)
        self.store_states("final_state", self.place.batch, slice_index, states)

    def fetch(self, chunk: jax.Array) -> dict[str, Any]:
        """Starts to read a chunk."""
        words = self.load_edge(chunk, [name for name in ("x", "dt", "z", "starts") if name in self.inputs])
        if self.single:
            words |= {name: self.load_matrix(name, chunk, 0) for name in ("B", "C")}
        return words

    def enter(self, chunk: jax.Array, words: dict[str, Any]) -> None:
        """Hands the lanes of the recurrence what they need of a chunk."""
        x, dt = (widen(words[name], self.inputs[name].dtype) for name in ("x", "dt"))
        starts = words["starts"][0] if "starts" in words else None
        steps, decay = self.step_sizes(chunk, added(dt, self.edge_constant("dt_bias")), starts)
        self.store_edge_pairs("pairs", decay, [a * b for a, b in zip(steps, x, strict=True)])
        if self.single:
            self.stage_matrices(words)
        self.w.sync_block()

    def stage_matrices(self, words: dict[str, Any]) -> None:
        """Writes the block's copy of B and C."""
        for name, offset in (("B", 0), ("C", SLICE)):
            self.stage_matrix(name, words[name], offset=offset)

    def kept(self, words: dict[str, Any]) -> dict[str, Any]:
        """The words that the end of a chunk needs."""
        return {name: words[name] for name in ("x", "z") if name in words}

    def walk_chunk(self, chunk: jax.Array, words: dict[str, Any]) -> dict[str, Any]:
        """Recurrence of a chunk that has been entered; the next one is read meanwhile and entered."""
        following = jnp.minimum(chunk + 1, self.last_chunk)
        next_words = self.fetch(following)
        if self.single:
            self.recur(chunk, 0, self.rates)
        else:
            self.recur_slices(chunk)
        self.w.sync_block()
        sums = self.load_edge_values("sums")
        self.finish(chunk, words, sums)
        self.enter(following, next_words)
        return self.kept(next_words)

    def finish(self, chunk: jax.Array, words: dict[str, Any], sums: Registers) -> None:
        """Adds the skip, applies the gate and writes y."""
        x = widen(words["x"], self.inputs["x"].dtype)
        y = list(sums)
        D = self.edge_constant("D")
        if D is not None:
            y = [value + skip * x for value, skip, x in zip(y, D, x, strict=True)]
        if "z" in words:
            gates = widen(words["z"], self.inputs["z"].dtype)
            y = [value * (z * sigmoid(self.w, z)) for value, z in zip(y, gates, strict=True)]
        self.store_edge("y", chunk, y)

    def recur_slices(self, chunk: jax.Array) -> None:
        """Runs the recurrence slice by slice, and adds up their sums over states."""

        def walk(slice_index):
            self.stage_matrices({name: self.load_matrix(name, chunk, slice_index) for name in ("B", "C")})
            self.w.sync_block()
            self.recur(chunk, slice_index, self.load_rates(slice_index))
            self.w.sync_block()

        self.store_edge_values("sums", [self.w.full(0.0)] * self.tiling.edge_channels)
        self.over_slices(walk)

    def recur(self, chunk: jax.Array, slice_index, rates) -> None:
        """Runs the recurrence through a chunk and writes the sums over states."""
        states = self.load_shared_states("states", slice_index)
        if self.features.checkpoints:
            leading = self.place.batch * self.geometry.chunks + chunk
            self.store_states("checkpoints", leading, slice_index, states)

        def walk(span, states):
            states = [list(values) for values in states]
            pairs = self.load_pairs(span)
            B, C = (self.load_rows(span, offset=offset) for offset in (0, SLICE))
            for r, (slot, (decay, dtx)) in enumerate(zip(self.own_slots(), pairs, strict=True)):
                sums = []
                for i in range(SPAN):
                    terms = []
                    for n in range(self.tiling.states_per_lane):
                        a = jnp.exp2(decay[i] * rates[r][n])
                        states[r][n] = a * states[r][n] + dtx[i] * B[i][n]
                        terms.append(states[r][n] * C[i][n])
                    sums.append(total(terms))
                self.add_sums("sums", span, self.sums_over_shares(sums), slot)
            return states

        states = loop(0, CHUNK // SPAN, walk, states)
        self.store_shared_states("states", slice_index, states)
