"""The kernel that lets parts of a sequence run at the same time: what each part makes of the state by itself."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.register_math import added, loop, sigmoid
from pallas_kernels.common.warpgroup import THREADS, Warpgroup, widen
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_gpu.geometry import CHUNK, RESET, SLICE, SPAN, Geometry, common_scratch
from pallas_kernels.selective_scan.pallas_gpu.kernel import Kernel


def scratch_types(geometry: Geometry) -> dict[str, Any]:
    """Shared memory of a block, in float32."""
    channels = geometry.tiling.channels_per_block
    return common_scratch(geometry.tiling) | {
        "states": plgpu.SMEM((geometry.slices * channels * SLICE,), jnp.float32),
        "steps": plgpu.SMEM((THREADS,), jnp.float32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeKernel:
    """A kernel that takes a zero state through parts of the sequence.

    Attributes:
        inputs: names of the arrays that it reads, where they are given.
        body: what a block does.
    """

    inputs: tuple[str, ...]
    body: type["_EdgeState"]

    def run(
        self,
        geometry: Geometry,
        features: Features,
        w: Warpgroup,
        inputs: dict[str, Any],
        outputs: dict[str, Any],
        shared,
    ) -> None:
        """Runs a block.

        Args:
            geometry: sizes.
            features: what is done.
            w: the warpgroup.
            inputs: as in the forward kernel, or in reverse as in the backward kernel.
            outputs: "part_states" (parts B G F, N), the state that the part ends with, and "part_steps" (parts B G F,
                1), the sum of its step sizes.
            shared: see `scratch_types`.
        """
        self.body(geometry, features, w, inputs, outputs, shared).run()


class _EdgeState(Kernel):
    """The recurrence through one part of the sequence, whichever way; subclasses say which."""

    matrix_name: str

    def part(self) -> jax.Array:
        """Number of the part."""
        raise NotImplementedError

    def order(self, i: Any, first: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The chunk that comes i-th, and the one to be read next."""
        raise NotImplementedError

    def weights(self, words: dict[str, Any], steps: list[jax.Array]) -> list[jax.Array]:
        """What multiplies the matrix of each token, by channel at the edges."""
        raise NotImplementedError

    def tokens(self, count: int) -> Iterable[int]:
        """Tokens in the order of the recurrence."""
        raise NotImplementedError

    def span(self, i: Any, spans: int) -> Any:
        """The span of tokens that comes i-th in a chunk."""
        raise NotImplementedError

    def advanced(self, state: jax.Array, decay: jax.Array, more: jax.Array) -> jax.Array:
        """The state after a token."""
        raise NotImplementedError

    def run(self) -> None:
        part = self.part()
        first = part * self.geometry.chunks_per_part
        stop = jnp.minimum(first + self.geometry.chunks_per_part, self.geometry.chunks)
        self.keep_constants()
        self.over_slices(lambda slice_index: self.store_shared_states("states", slice_index, self.zeros()))
        if self.single:
            self.rates = self.load_rates(0)

        def walk(i, carry):
            words, totals = carry
            chunk, following = self.order(i, first, stop)
            next_words = self.fetch(following)
            return next_words, added(totals, self.walk_chunk(chunk, words))

        totals = [self.w.full(0.0)] * self.tiling.edge_channels
        start, _ = self.order(0, first, stop)
        _, totals = loop(0, stop - first, walk, (self.fetch(start), totals))
        self.leave(part, totals)

    def leave(self, part: jax.Array, totals: list[jax.Array]) -> None:
        """Writes the states, and the sums of the step sizes, of the part."""
        leading = part * self.geometry.batch + self.place.batch
        self.over_slices(
            lambda slice_index: self.store_states(
                "part_states", leading, slice_index, self.load_shared_states("states", slice_index)
            )
        )
        for i, total in enumerate(self.sums_over_tokens("steps", totals)):
            # A part with a reset in it passes nothing on, and infinity times a rate would not be a number.
            total = jnp.minimum(total, RESET)
            row = leading * self.geometry.width + (self.edge_columns() + i)
            self.w.store(self.outputs["part_steps"], self.place.zero, (total,), row=row, pitch=1)

    def fetch(self, chunk: jax.Array) -> dict[str, Any]:
        """Starts to read a chunk."""
        words = self.load_edge(chunk, [name for name in ("x", "dy", "z", "dt", "starts") if name in self.inputs])
        if self.single:
            words["matrix"] = self.load_matrix(self.matrix_name, chunk, 0)
        return words

    def walk_chunk(self, chunk: jax.Array, words: dict[str, Any]) -> list[jax.Array]:
        """Takes the states through a chunk; returns its step sizes, by channel at the edges."""
        dt = widen(words["dt"], self.inputs["dt"].dtype)
        starts = words["starts"][0] if "starts" in words else None
        steps, decay = self.step_sizes(chunk, added(dt, self.edge_constant("dt_bias")), starts)
        self.store_edge_pairs("pairs", decay, self.weights(words, steps))

        def walk_slice(slice_index):
            matrix = words["matrix"] if self.single else self.load_matrix(self.matrix_name, chunk, slice_index)
            rates = self.rates if self.single else self.load_rates(slice_index)
            self.stage_matrix(self.matrix_name, matrix, offset=0)
            self.w.sync_block()
            self.recur(slice_index, rates)
            # The next slice stages its matrix where this one is read.
            self.w.sync_block()

        self.over_slices(walk_slice)
        return decay

    def recur(self, slice_index, rates) -> None:
        """Takes the states of a slice through a chunk."""
        spans = CHUNK // SPAN

        def walk(i, states):
            states = [list(values) for values in states]
            span = self.span(i, spans)
            rows = self.load_rows(span, offset=0)
            for r, (decay, weights) in enumerate(self.load_pairs(span)):
                for i in self.tokens(SPAN):
                    for n in range(self.tiling.states_per_lane):
                        a = jnp.exp2(decay[i] * rates[r][n])
                        states[r][n] = self.advanced(states[r][n], a, weights[i] * rows[i][n])
            return states

        states = loop(0, spans, walk, self.load_shared_states("states", slice_index))
        self.store_shared_states("states", slice_index, states)


class _FinalState(_EdgeState):
    """h_t = a_t h_{t-1} + dt_t x_t B_t through the first parts of the sequence, as many as the grid has."""

    matrix_name = "B"

    def part(self) -> jax.Array:
        return jax.lax.axis_index("part")

    def order(self, i, first, stop):
        chunk = first + i
        return chunk, jnp.minimum(chunk + 1, self.geometry.chunks - 1)

    def weights(self, words, steps):
        return [a * b for a, b in zip(steps, widen(words["x"], self.inputs["x"].dtype), strict=True)]

    def tokens(self, count):
        return range(count)

    def span(self, i, spans):
        return i

    def advanced(self, state, decay, more):
        return decay * state + more


class _InitialCotangent(_EdgeState):
    """dh_{t-1} = a_t (dh_t + dy_t C_t), with dy before the gate, through the last parts of the sequence, backwards."""

    matrix_name = "C"

    def part(self) -> jax.Array:
        return jax.lax.axis_index("part") + (self.geometry.tiling.parts - jax.lax.axis_size("part"))

    def order(self, i, first, stop):
        chunk = stop - 1 - i
        return chunk, jnp.maximum(chunk - 1, 0)

    def weights(self, words, steps):
        del steps
        weights = widen(words["dy"], self.inputs["dy"].dtype)
        if "z" not in words:
            return list(weights)
        gates = widen(words["z"], self.inputs["z"].dtype)
        return [dy * (z * sigmoid(self.w, z)) for dy, z in zip(weights, gates, strict=True)]

    def tokens(self, count):
        return reversed(range(count))

    def span(self, i, spans):
        return spans - 1 - i

    def advanced(self, state, decay, more):
        return decay * (state + more)


final_state = EdgeKernel(inputs=("x", "dt", "B", "A", "dt_bias", "starts"), body=_FinalState)
initial_cotangent = EdgeKernel(inputs=("dy", "z", "dt", "C", "A", "dt_bias", "starts"), body=_InitialCotangent)
