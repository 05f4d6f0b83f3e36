"""The forward kernel of the selective scan on NVIDIA GPUs (Hopper and newer); docs/kernels.md explains it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.pallas_gpu_common import (
    CHUNK,
    GROUP,
    MATRIX_PITCH,
    PAIR_PITCH,
    SLICE,
    VALUE_PITCH,
    Features,
    Geometry,
    Kernel,
    Registers,
    added,
    loop,
    plus,
    sigmoid,
)
from pallas_kernels.warpgroup import WARPS, Warpgroup, widen


def scratch_types(geometry: Geometry) -> dict[str, Any]:
    """Shared memory of a block, in float32; every warp has its own part."""
    channels = geometry.tiling.channels_per_block
    return {
        "pairs": plgpu.SMEM((channels * PAIR_PITCH,), jnp.float32),
        "matrices": plgpu.SMEM((WARPS * CHUNK * MATRIX_PITCH,), jnp.float32),
        "sums": plgpu.SMEM((channels * VALUE_PITCH,), jnp.float32),
        "states": plgpu.SMEM((geometry.slices * channels * SLICE,), jnp.float32),
    }


def kernel(
    w: Warpgroup, geometry: Geometry, features: Features, inputs: dict[str, Any], outputs: dict[str, Any], shared
) -> None:
    """Runs a block: its channels of one batch row, through one part of the sequence.

    Args:
        w: the warpgroup.
        geometry: sizes.
        features: what is done.
        inputs: references "x", "dt", "z" (B L, G F), "B", "C" (B L, G N), "A" (G F, N) in units of log2, "D", "dt_bias"
            (1, G F), "starts" (B L, 1), "initial_state" (B G F, N); the optional ones if present. If the sequence is in
            parts, "part_states" (parts B G F, N) and "part_steps" (parts B G F, 1) of `pallas_gpu_parts`.
        outputs: "y" (B L, G F), "final_state" (B G F, N) and, if wanted, "checkpoints" (B chunks G F, N).
        shared: see `scratch_types`.
    """
    _Forward(w, geometry, features, inputs, outputs, shared).run()


class _Forward(Kernel):
    def run(self) -> None:
        part = jax.lax.axis_index("part")
        first = part * self.geometry.chunks_per_part
        stop = jnp.minimum(first + self.geometry.chunks_per_part, self.geometry.chunks)
        self.last_chunk = self.geometry.chunks - 1
        self.D, self.dt_bias = self.edge_constant("D"), self.edge_constant("dt_bias")
        self.over_slices(lambda slice_index: self.initialise(part, slice_index))
        if self.single:
            self.rates = self.load_states("A", self.lanes.zero, 0)

        words = self.fetch(first)
        self.stage(self.enter(first, words))
        self.w.sync_warp()
        words = self.kept(words)
        # What is finished in the first round is written again, right, in the second.
        nothing = [self.w.full(0.0)] * self.tiling.edge_channels

        def walk(chunk, carry):
            return self.walk_chunk(chunk, jnp.maximum(chunk - 1, first), *carry)

        before, _, sums = loop(first, stop, walk, (words, words, nothing))
        self.finish(stop - 1, before, sums)

        @pl.when(part == self.tiling.parts - 1)
        def _():
            self.over_slices(self.write_final_state)

    def initialise(self, part, slice_index) -> None:
        states = self.zeros()
        if "initial_state" in self.inputs:
            states = self.load_states("initial_state", self.lanes.batch, slice_index)
        if self.tiling.parts > 1:
            rates = self.load_states("A", self.lanes.zero, slice_index)
            states = self.carried(states, 0, part, rates, slice_index)
        self.store_shared_states("states", slice_index, states)

    def write_final_state(self, slice_index) -> None:
        states = self.load_shared_states("states", slice_index)
        self.store_states("final_state", self.lanes.batch, slice_index, states)

    def fetch(self, chunk: jax.Array) -> dict[str, Any]:
        """Starts to read a chunk."""
        words = self.load_edge(chunk, [name for name in ("x", "dt", "z", "starts") if name in self.inputs])
        if self.single:
            words |= {name: self.load_matrix(name, chunk, 0) for name in ("B", "C")}
        return words

    def enter(self, chunk: jax.Array, words: dict[str, Any]) -> dict[str, Any]:
        """What the recurrence needs of a chunk."""
        x, dt = (widen(words[name], self.inputs[name].dtype) for name in ("x", "dt"))
        starts = words["starts"][0] if "starts" in words else None
        steps, decay = self.step_sizes(chunk, added(dt, self.dt_bias), starts)
        values = {"decay": decay, "dtx": [a * b for a, b in zip(steps, x, strict=True)]}
        if self.single:
            values |= {name: widen(words[name], self.inputs[name].dtype) for name in ("B", "C")}
        return values

    def stage(self, values: dict[str, Any]) -> None:
        """Hands it to the lanes of the recurrence."""
        self.stage_pairs(values["decay"], values["dtx"])
        if self.single:
            self.stage_matrix(values["B"], offset=0)
            self.stage_matrix(values["C"], offset=SLICE)

    def kept(self, words: dict[str, Any]) -> dict[str, Any]:
        """The words that the end of a chunk needs."""
        return {name: words[name] for name in ("x", "z") if name in words}

    def walk_chunk(self, chunk: jax.Array, previous: jax.Array, words_before, words, sums):
        """Recurrence of a staged chunk. The edges of its neighbours stand around it, so that it hides their latency.

        Args:
            chunk, previous: indices of this chunk and of the one to be finished.
            words_before, words: what `finish` needs of either.
            sums: over states, of the previous chunk, at the edges.
        """
        self.finish(previous, words_before, sums)
        following = jnp.minimum(chunk + 1, self.last_chunk)
        next_words = self.fetch(following)
        if self.single:
            results, values = self.recur(chunk, 0, self.rates, lambda: self.enter(following, next_words))
        else:
            values = self.enter(following, next_words)
            results = self.recur_slices(chunk)
        index = self.lanes.channel * VALUE_PITCH + self.lanes.first_sum
        for group, sums_of_channels in enumerate(results):
            for r, values_of_channel in enumerate(sums_of_channels):
                offset = r * self.lanes.channel_stride * VALUE_PITCH + group * GROUP
                self.w.store(self.shared["sums"], index, values_of_channel, offset=offset)
        self.w.sync_warp()
        self.stage(values)
        index = self.lanes.edge_channel * VALUE_PITCH + self.lanes.token
        offsets = [i * VALUE_PITCH for i in range(self.tiling.edge_channels)]
        sums = [self.w.load(self.shared["sums"], index, 1, offset=offset)[0] for offset in offsets]
        self.w.sync_warp()
        return words, self.kept(next_words), sums

    def finish(self, chunk: jax.Array, words: dict[str, Any], sums: Registers) -> None:
        """Adds the skip, applies the gate and writes y."""
        x = widen(words["x"], self.inputs["x"].dtype)
        y = list(sums)
        if self.D is not None:
            y = [value + D * x for value, D, x in zip(y, self.D, x, strict=True)]
        if "z" in words:
            gates = widen(words["z"], self.inputs["z"].dtype)
            y = [value * (z * sigmoid(self.w, z)) for value, z in zip(y, gates, strict=True)]
        self.store_edge("y", chunk, y)

    def recur_slices(self, chunk: jax.Array):
        """Runs the recurrence slice by slice; returns the sums over all."""

        def walk(slice_index, totals):
            for name, offset in (("B", 0), ("C", SLICE)):
                words = self.load_matrix(name, chunk, slice_index)
                self.stage_matrix(widen(words, self.inputs[name].dtype), offset=offset)
            self.w.sync_warp()
            rates = self.load_states("A", self.lanes.zero, slice_index)
            results, _ = self.recur(chunk, slice_index, rates, lambda: None)
            self.w.sync_warp()
            return jax.tree.map(jnp.add, totals, results)

        count = max(1, GROUP // self.tiling.lanes)
        totals = [[[self.w.full(0.0)] * count for _ in range(self.tiling.rows)] for _ in range(CHUNK // GROUP)]
        return loop(0, self.geometry.slices, walk, totals)

    def recur(self, chunk: jax.Array, slice_index, rates, aside: Callable[[], Any]):
        """Runs the recurrence through a chunk.

        Returns:
            The sums over states, by group and channel, and the result of `aside`, which is called on the way.
        """
        states = [list(values) for values in self.load_shared_states("states", slice_index)]
        if self.features.checkpoints:
            leading = self.lanes.batch * self.geometry.chunks + chunk
            self.store_states("checkpoints", leading, slice_index, states)
        results = []
        result_aside = None
        for start in range(0, CHUNK, GROUP):
            if start == CHUNK - GROUP:
                result_aside = aside()
            pairs = self.load_pairs(start)
            B = self.load_rows(start, offset=0, copy=self.lanes.warp)
            C = self.load_rows(start, offset=SLICE, copy=self.lanes.warp)
            sums = []
            for r, (decay, dtx) in enumerate(pairs):
                partial = []
                for i in range(GROUP):
                    y = None
                    for n in range(self.tiling.states_per_lane):
                        a = jnp.exp2(decay[i] * rates[r][n])
                        states[r][n] = a * states[r][n] + dtx[i] * B[i][n]
                        y = plus(y, states[r][n] * C[i][n])
                    partial.append(y)
                sums.append(self.sums_over_shares(partial))
            results.append(sums)
        self.store_shared_states("states", slice_index, states)
        return results, result_aside
