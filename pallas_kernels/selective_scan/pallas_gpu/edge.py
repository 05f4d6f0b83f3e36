"""The edge kernels of the selective scan on NVIDIA GPUs: what a part of the sequence makes of a state of zero.

One runs equation 4 forward and leaves h' of equation 21, the other runs equations 10 and 11 backwards and leaves the
same for the gradient. Neither computes outputs. With them, parts of a sequence can run at the same time.
"""

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
        # For `sums_over_tokens`.
        "steps": plgpu.SMEM((THREADS,), jnp.float32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeKernel:
    """A kernel that takes a state of zero through parts of the sequence.

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
    """The recurrence through one part of the sequence; a subclass says in which direction, and of what."""

    matrix_name: str

    def part(self) -> jax.Array:
        """Number of the part that the block works on, counted from the start of the sequence."""
        raise NotImplementedError

    def order(self, i: Any, first: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The chunk that comes i-th, and the one to be read next."""
        raise NotImplementedError

    def weights(self, words: dict[str, Any], steps: list[jax.Array]) -> list[jax.Array]:
        """The factor of B_t (dt x, equation 3) or of C_t (equation 8), for each channel of the thread at the edges."""
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
        """Takes a block's channels through all chunks of its part; writes the last state and the sum of the steps.

        States lie in shared memory between chunks; values of the next chunk are read while this one is worked on.
        """
        part = self.part()
        first = part * self.geometry.chunks_per_part
        stop = jnp.minimum(first + self.geometry.chunks_per_part, self.geometry.chunks)
        self.keep_constants()
        # Started from zero; what came before the part is added later, by equation 21.
        self.over_slices(lambda slice_index: self.store_shared_states("states", slice_index, self.zeros()))
        if self.single:
            self.rates = self.load_rates(0)

        def walk(i, carry):
            words, totals = carry
            chunk, following = self.order(i, first, stop)
            # The next chunk's loads have a whole recurrence's time to arrive.
            next_words = self.fetch(following)
            return next_words, added(totals, self.walk_chunk(chunk, words))

        totals = [self.w.full(0.0)] * self.tiling.edge_channels
        start, _ = self.order(0, first, stop)
        _, totals = loop(0, stop - first, walk, (self.fetch(start), totals))
        self.leave(part, totals)

    def leave(self, part: jax.Array, totals: list[jax.Array]) -> None:
        """Writes h' and s of equation 21."""
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
        """Takes the states through a chunk; returns its steps, huge at resets, for each channel at the edges."""
        dt = widen(words["dt"], self.inputs["dt"].dtype)
        starts = words["starts"][0] if "starts" in words else None
        steps, decay = self.step_sizes(chunk, added(dt, self.edge_constant("dt_bias")), starts)
        self.store_edge_pairs("pairs", decay, self.weights(words, steps))

        # The pairs serve all slices; only the matrix and the rates change from one to the next.
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
                        # Equation 2, then 4 or 10 and 11.
                        a = jnp.exp2(decay[i] * rates[r][n])
                        states[r][n] = self.advanced(states[r][n], a, weights[i] * rows[i][n])
            return states

        states = loop(0, spans, walk, self.load_shared_states("states", slice_index))
        self.store_shared_states("states", slice_index, states)


class _FinalState(_EdgeState):
    """Equation 4, h_t = a_t h_{t-1} + dt_t x_t B_t, through as many of the first parts as the grid has."""

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
    """Equations 10 and 11, g_{t-1} = a_t (g_t + dp_t C_t), backwards through the grid's number of last parts."""

    matrix_name = "C"

    def part(self) -> jax.Array:
        # The first part's gradient leaves the sequence: a grid of fewer parts covers the last ones.
        return jax.lax.axis_index("part") + (self.geometry.tiling.parts - jax.lax.axis_size("part"))

    def order(self, i, first, stop):
        chunk = stop - 1 - i
        return chunk, jnp.maximum(chunk - 1, 0)

    def weights(self, words, steps):
        # Equation 8 by itself: C_t has no step.
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
