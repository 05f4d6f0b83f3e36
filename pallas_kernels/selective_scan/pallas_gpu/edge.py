"""The kernel that lets parts of a sequence run at the same time: what each part makes of the state by itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.register_math import added, loop, sigmoid
from pallas_kernels.common.warpgroup import THREADS, Warpgroup, widen
from pallas_kernels.selective_scan.argument_layout import Features
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, GROUP, RESET, SLICE, Geometry, common_scratch
from pallas_kernels.selective_scan.pallas_gpu.kernel import Kernel


def scratch_types(geometry: Geometry) -> dict[str, Any]:
    """Shared memory of a block, in float32."""
    channels = geometry.tiling.channels_per_block
    return common_scratch(geometry.tiling) | {
        "states": plgpu.SMEM((geometry.slices * channels * SLICE,), jnp.float32),
        "steps": plgpu.SMEM((THREADS,), jnp.float32),
    }


def kernel(
    geometry: Geometry, features: Features, w: Warpgroup, inputs: dict[str, Any], outputs: dict[str, Any], shared
) -> None:
    """Runs a block: the recurrence through one part, from a zero state.

    Forward h_t = a_t h_{t-1} + dt_t x_t B_t, for the first parts of the sequence, as many as the grid has. In reverse,
    if there is a "dy", d_{t-1} = a_t (d_t + dy_t C_t), with dy before the gate, for the last parts.

    Args:
        geometry: sizes.
        features: what is done.
        w: the warpgroup.
        inputs: as in the forward kernel, or in reverse as in the backward kernel.
        outputs: "part_states" (parts B G F, N), the state that the part ends with, and "part_steps" (parts B G F, 1),
            the sum of its step sizes.
        shared: see `scratch_types`.
    """
    _Parts(geometry, features, w, inputs, outputs, shared).run()


class _Parts(Kernel):
    def run(self) -> None:
        self.is_reverse = "dy" in self.inputs
        part = jax.lax.axis_index("part")
        if self.is_reverse:
            part += self.geometry.tiling.parts - jax.lax.axis_size("part")
        first = part * self.geometry.chunks_per_part
        stop = jnp.minimum(first + self.geometry.chunks_per_part, self.geometry.chunks)
        self.keep_constants()
        self.over_slices(lambda slice_index: self.store_shared_states("states", slice_index, self.zeros()))
        if self.single:
            self.rates = self.load_rates(0)

        def walk(i, carry):
            words, totals = carry
            chunk = stop - 1 - i if self.is_reverse else first + i
            following = (
                jnp.maximum(chunk - 1, 0) if self.is_reverse else jnp.minimum(chunk + 1, self.geometry.chunks - 1)
            )
            next_words = self.fetch(following)
            return next_words, added(totals, self.walk_chunk(chunk, words))

        totals = [self.w.full(0.0)] * self.tiling.edge_channels
        start = stop - 1 if self.is_reverse else first
        _, totals = loop(0, stop - first, walk, (self.fetch(start), totals))
        leading = part * self.geometry.batch + self.lanes.batch
        self.over_slices(
            lambda slice_index: self.store_states(
                "part_states", leading, slice_index, self.load_shared_states("states", slice_index)
            )
        )
        for i, total in enumerate(self.sums_over_tokens("steps", totals)):
            total = jnp.minimum(total, RESET)
            row = leading * self.geometry.width + (self.edge_columns() + i)
            self.w.store(self.outputs["part_steps"], self.lanes.zero, (total,), row=row, pitch=1)

    def fetch(self, chunk: jax.Array) -> dict[str, Any]:
        """Starts to read a chunk."""
        names = ("dy", "z", "dt", "starts") if self.is_reverse else ("x", "dt", "starts")
        words = self.load_edge(chunk, [name for name in names if name in self.inputs])
        if self.single:
            words["matrix"] = self.load_matrix(self.matrix_name, chunk, 0)
        return words

    @property
    def matrix_name(self) -> str:
        return "C" if self.is_reverse else "B"

    def walk_chunk(self, chunk: jax.Array, words: dict[str, Any]) -> list[jax.Array]:
        """Takes the states through a chunk; returns its step sizes, by channel at the edges."""
        dt = widen(words["dt"], self.inputs["dt"].dtype)
        starts = words["starts"][0] if "starts" in words else None
        steps, decay = self.step_sizes(chunk, added(dt, self.edge_constant("dt_bias")), starts)
        if self.is_reverse:
            weights = widen(words["dy"], self.inputs["dy"].dtype)
            if "z" in words:
                gates = widen(words["z"], self.inputs["z"].dtype)
                weights = [dy * (z * sigmoid(self.w, z)) for dy, z in zip(weights, gates, strict=True)]
        else:
            weights = [a * b for a, b in zip(steps, widen(words["x"], self.inputs["x"].dtype), strict=True)]
        self.store_edge_pairs("pairs", decay, weights)

        def walk_slice(slice_index):
            matrix = words["matrix"] if self.single else self.load_matrix(self.matrix_name, chunk, slice_index)
            rates = self.rates if self.single else self.load_rates(slice_index)
            self.stage_matrix(self.matrix_name, matrix, offset=0)
            self.w.sync_block()
            self.recur(slice_index, rates)
            self.w.sync_block()

        self.over_slices(walk_slice)
        return decay

    def recur(self, slice_index, rates) -> None:
        """Takes the states of a slice through a chunk."""
        groups = CHUNK // GROUP

        def walk(i, states):
            states = [list(values) for values in states]
            group = groups - 1 - i if self.is_reverse else i
            rows = self.load_rows(group, offset=0)
            for r, (decay, weights) in enumerate(self.load_pairs(group)):
                for i in reversed(range(GROUP)) if self.is_reverse else range(GROUP):
                    for n in range(self.tiling.states_per_lane):
                        a = jnp.exp2(decay[i] * rates[r][n])
                        more = weights[i] * rows[i][n]
                        states[r][n] = a * (states[r][n] + more) if self.is_reverse else a * states[r][n] + more
            return states

        states = loop(0, groups, walk, self.load_shared_states("states", slice_index))
        self.store_shared_states("states", slice_index, states)
