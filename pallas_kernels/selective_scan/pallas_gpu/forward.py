"""The forward kernel of the selective scan on NVIDIA GPUs (Hopper and newer): equations 1 to 6 of README.md.

A chunk passes through three stages: `enter` (edge role: equation 1, and 3 without B), `recur` (recurrence role:
equations 2, 4 and the sum of 5) and `finish` (edge role: the rest of 5, and 6). docs/kernels.md explains why.
"""

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
    """What the forward kernel keeps in the shared memory of a block, by name: types of float32 arrays."""
    channels = geometry.tiling.channels_per_block
    return common_scratch(geometry.tiling) | {
        # The sums over states of equation 5, on their way from the recurrence to the edges.
        "sums": plgpu.SMEM((value_slots(geometry.tiling),), jnp.float32),
        # The state waits here between chunks: at the edges its registers are needed for other things.
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
            parts, "part_states" (parts B G F, N) and "part_steps" (parts B G F, 1) of the edge kernel.
        outputs: "y" (B L, G F), "final_state" (B G F, N) and, if wanted, "checkpoints" (B chunks G F, N).
        shared: see `scratch_types`.
    """
    _Forward(geometry, features, w, inputs, outputs, shared).run()


class _Forward(Kernel):
    """One block of the forward kernel."""

    def run(self) -> None:
        """Walks through the block's part of the sequence, chunk by chunk."""
        part = jax.lax.axis_index("part")
        first = part * self.geometry.chunks_per_part
        stop = jnp.minimum(first + self.geometry.chunks_per_part, self.geometry.chunks)
        self.last_chunk = self.geometry.chunks - 1
        self.keep_constants()
        self.over_slices(lambda slice_index: self.initialise(part, slice_index))
        if self.single:
            self.rates = self.load_rates(0)

        # The loop finds its chunk entered, and enters the next: its loads then have a whole recurrence's time to
        # arrive.
        words = self.fetch(first)
        self.enter(first, words)
        loop(first, stop, self.walk_chunk, self.kept(words))

        # The last part alone ends with the state of the whole sequence.
        @pl.when(part == self.tiling.parts - 1)
        def _():
            self.over_slices(self.write_final_state)

    def initialise(self, part, slice_index) -> None:
        """Puts the state that the part starts with, h_0 of equation 4 or equation 21 of it, into shared memory."""
        states = self.zeros()
        if "initial_state" in self.inputs:
            states = self.load_states("initial_state", self.place.batch, slice_index)
        if self.tiling.parts > 1:
            rates = self.load_rates(slice_index)
            states = self.carried(states, 0, part, rates, slice_index)
        self.store_shared_states("states", slice_index, states)

    def write_final_state(self, slice_index) -> None:
        """Writes h_L of a slice."""
        states = self.load_shared_states("states", slice_index)
        self.store_states("final_state", self.place.batch, slice_index, states)

    def fetch(self, chunk: jax.Array) -> dict[str, Any]:
        """Starts to read a chunk."""
        words = self.load_edge(chunk, [name for name in ("x", "dt", "z", "starts") if name in self.inputs])
        # Several slices of B and C would take too many registers; they are read when their turn comes.
        if self.single:
            words |= {name: self.load_matrix(name, chunk, 0) for name in ("B", "C")}
        return words

    def enter(self, chunk: jax.Array, words: dict[str, Any]) -> None:
        """Hands the lanes of the recurrence what they need of a chunk."""
        x, dt = (widen(words[name], self.inputs[name].dtype) for name in ("x", "dt"))
        starts = words["starts"][0] if "starts" in words else None
        # Equation 1 once per token and channel; in the recurrence, S lanes would each compute it.
        steps, decay = self.step_sizes(chunk, added(dt, self.edge_constant("dt_bias")), starts)
        # Of equation 3 what does not depend on the state, dt x, next to the exponent's dt.
        self.store_edge_pairs("pairs", decay, [a * b for a, b in zip(steps, x, strict=True)])
        if self.single:
            self.stage_matrices(words)
        # From here on other threads read what this one has written.
        self.w.sync_block()

    def stage_matrices(self, words: dict[str, Any]) -> None:
        """Writes the block's copy of B and C."""
        for name, offset in (("B", 0), ("C", SLICE)):
            self.stage_matrix(name, words[name], offset=offset)

    def kept(self, words: dict[str, Any]) -> dict[str, Any]:
        """The words that `finish` needs; as words, bfloat16 takes half the registers that float32 does."""
        return {name: words[name] for name in ("x", "z") if name in words}

    def walk_chunk(self, chunk: jax.Array, words: dict[str, Any]) -> dict[str, Any]:
        """Recurrence of a chunk that has been entered; the next one is read meanwhile and entered."""
        # After the last chunk there is nothing to read: the last is read again, and not used.
        following = jnp.minimum(chunk + 1, self.last_chunk)
        next_words = self.fetch(following)
        if self.single:
            self.recur(chunk, 0, self.rates)
        else:
            self.recur_slices(chunk)
        # Sums were written in the recurrence role, and are read in the edge role by other threads.
        self.w.sync_block()
        sums = self.load_edge_values("sums")
        self.finish(chunk, words, sums)
        self.enter(following, next_words)
        return self.kept(next_words)

    def finish(self, chunk: jax.Array, words: dict[str, Any], sums: Registers) -> None:
        """The skip of equation 5, the gate of equation 6; writes y."""
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
            # One slice's B and C are in shared memory at a time: barriers before they are read and before the next.
            self.stage_matrices({name: self.load_matrix(name, chunk, slice_index) for name in ("B", "C")})
            self.w.sync_block()
            self.recur(chunk, slice_index, self.load_rates(slice_index))
            self.w.sync_block()

        # Slices add to the sums; the first barrier in `walk` makes the zeros visible.
        self.store_edge_values("sums", [self.w.full(0.0)] * self.tiling.edge_channels)
        self.over_slices(walk)

    def recur(self, chunk: jax.Array, slice_index, rates) -> None:
        """Equation 4 through a chunk, for a slice of states, and the sums over them of equation 5."""
        states = self.load_shared_states("states", slice_index)
        # The backward kernel starts from the state before each chunk, and computes the others again.
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
                        # Equations 2, 3 and 4: one exponential and two multiply-adds for a state and token.
                        a = jnp.exp2(decay[i] * rates[r][n])
                        states[r][n] = a * states[r][n] + dtx[i] * B[i][n]
                        # Equation 5: first over the lane's own states, in registers.
                        terms.append(states[r][n] * C[i][n])
                    sums.append(total(terms))
                # Then over the lanes that share the channel, for SPAN tokens at once: fewer shuffles than one by one.
                self.add_sums("sums", span, self.sums_over_shares(sums), slot)
            return states

        states = loop(0, CHUNK // SPAN, walk, states)
        self.store_shared_states("states", slice_index, states)
