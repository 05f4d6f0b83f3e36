"""The backward kernel of the selective scan on NVIDIA GPUs (Hopper and newer): equations 8 to 19 of README.md.

Chunks come in reverse. Each passes through four stages: `enter` (edge role: equations 1, 3 and 8), `recompute`
(recurrence role: equation 4 from the stored state, with all states kept in shared memory), `walk_span` (the same role:
equations 10 to 15 and the sum of 17, backwards) and `leave` (edge role: equations 9 and 16 to 19).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.register_math import LN_2, Registers, added, loop, sigmoid, total
from pallas_kernels.common.warpgroup import THREADS, WARPS, Warpgroup, widen
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_gpu.geometry import (
    CHUNK,
    EDGE_LANES,
    SLICE,
    SPAN,
    Geometry,
    common_scratch,
    log2,
    value_slots,
)
from pallas_kernels.selective_scan.pallas_gpu.kernel import Kernel

# Values that the threads at the edges compute before the recurrence and need again after it: dt of equation 1, its
# slope (the sigmoid of equation 18), and the sigmoid of z. They wait in shared memory, not in registers.
_KEPT = ("dt", "slope", "gate")


def scratch_types(geometry: Geometry) -> dict[str, Any]:
    """Shared memory of a block, in float32."""
    tiling = geometry.tiling
    channels = tiling.channels_per_block

    def floats(count):
        return plgpu.SMEM((count,), jnp.float32)

    scratch = common_scratch(tiling) | {
        # Gradient of the output before the gate, equation 8.
        "dy": floats(value_slots(tiling)),
        # The states before every token of a chunk, by warp.
        "history": floats(WARPS * (CHUNK + 1) * _history_pitch(geometry)),
        # Written and read by the same thread, see `_KEPT`.
        "kept": floats(len(_KEPT) * CHUNK * channels),
        # Equation 14 within each warp, before the warps' sums are added.
        "matrix_sums": floats(WARPS * CHUNK * 2 * SLICE),
    }
    # One slice keeps these in registers, and writes its sums over what it has read. Several take turns.
    if geometry.slices > 1:
        scratch["sum_pairs"] = floats(2 * value_slots(tiling))
        scratch["sum_y"] = floats(value_slots(tiling))
        scratch["dstates"] = floats(geometry.slices * channels * SLICE)
        scratch["dA"] = floats(geometry.slices * channels * SLICE)
    return scratch


def _history_pitch(geometry: Geometry) -> int:
    """Floats from one token's states to the next: the channels of a warp."""
    return geometry.tiling.channels_per_warp * SLICE


def kernel(
    geometry: Geometry, features: Features, w: Warpgroup, inputs: dict[str, Any], outputs: dict[str, Any], shared
) -> None:
    """Runs a block: its channels of one batch row, back through one part of the sequence.

    Args:
        geometry: sizes.
        features: what is done.
        w: the warpgroup.
        inputs: those of the forward kernel but for the initial state, and "checkpoints" (B chunks G F, N), "dy"
            (B L, G F), "dfinal_state" (B G F, N).
        outputs: "dx", "ddt", "dz" (B L, G F), "dmatrices" (blocks B L, G 2 N), the sums over a block's channels of the
            gradients of B and C, "dA" (parts B G F, N), "dinitial_state" (B G F, N), "dD" and "ddt_bias" (parts B,
            G F); the optional ones if their argument is present.
        shared: see `scratch_types`.
    """
    _Backward(geometry, features, w, inputs, outputs, shared).run()


class _Backward(Kernel):
    """One block of the backward kernel."""

    def run(self) -> None:
        """Walks back through the block's part of the sequence, chunk by chunk."""
        geometry, tiling = self.geometry, self.tiling
        part = jax.lax.axis_index("part")
        first = part * geometry.chunks_per_part
        stop = jnp.minimum(first + geometry.chunks_per_part, geometry.chunks)
        self.keep_constants()
        self.history = (
            self.place.warp * ((CHUNK + 1) * _history_pitch(geometry))
            + self.place.lane_channel * SLICE
            + self.place.state
        )
        # The gradients of the state and of A, equations 11 and 13, are carried from chunk to chunk.
        states = ()
        if self.single:
            self.rates = self.load_rates(0)
            states = self.initial_dstates(part, 0), self.zeros()
        else:
            self.over_slices(lambda slice_index: self.initialise(part, slice_index))

        def walk(i, carry):
            return self.walk_chunk(stop - 1 - i, *carry)

        zeros = [self.w.full(0.0)] * tiling.edge_channels
        carry = self.fetch(stop - 1), (zeros, zeros), states
        _, totals, states = loop(0, stop - first, walk, carry)

        self.over_slices(lambda slice_index: self.write_states(part, slice_index, states))
        # `sums_over_tokens` uses memory that other warps may still read.
        self.w.sync_block()
        # Sums over time, equations 18 and 19: one row for each part and batch row, which XLA adds up in a fixed order.
        row = part * geometry.batch + self.place.batch
        for name, values in zip(("dD", "ddt_bias"), totals, strict=True):
            if name in self.outputs:
                values = self.sums_over_tokens("matrix_sums", values)
                self.w.store(self.outputs[name], self.edge_columns(), values, row=row, pitch=geometry.width)

    def initial_dstates(self, part, slice_index) -> list[Registers]:
        """Equation 10's g at the part's end: the final state's gradient, brought back by equation 21."""
        dstates = self.load_states("dfinal_state", self.place.batch, slice_index)
        if self.tiling.parts > 1:
            rates = self.load_rates(slice_index)
            dstates = self.carried(dstates, self.tiling.parts - 1, part, rates, slice_index)
        return dstates

    def initialise(self, part, slice_index) -> None:
        """Puts a slice's gradients of the state and of A into shared memory, where they wait for the slice's turn."""
        self.store_shared_states("dstates", slice_index, self.initial_dstates(part, slice_index))
        self.store_shared_states("dA", slice_index, self.zeros())

    def write_states(self, part, slice_index, states) -> None:
        """Writes the part's dA, and from the first part the gradient of the initial state."""
        if self.single:
            dstates, dA = states
        else:
            dstates, dA = (self.load_shared_states(name, slice_index) for name in ("dstates", "dA"))
        self.store_states("dA", part * self.geometry.batch + self.place.batch, slice_index, dA)

        @pl.when(part == 0)
        def _():
            self.store_states("dinitial_state", self.place.batch, slice_index, dstates)

    def fetch(self, chunk: jax.Array) -> dict[str, Any]:
        """Starts to read a chunk."""
        words = self.load_edge(chunk, [name for name in ("x", "dt", "z", "dy", "starts") if name in self.inputs])
        return words | self.fetch_slice(chunk, 0) if self.single else words

    def fetch_slice(self, chunk: jax.Array, slice_index) -> dict[str, Any]:
        """Starts to read a slice of B, C and the state at the start of a chunk, as the forward kernel has stored it."""
        words = {name: self.load_matrix(name, chunk, slice_index) for name in ("B", "C")}
        leading = self.place.batch * self.geometry.chunks + chunk
        return words | {"states": self.load_states("checkpoints", leading, slice_index)}

    def walk_chunk(self, chunk: jax.Array, words: dict[str, Any], totals, states):
        """Takes a chunk's gradients back; the next one to come is read meanwhile."""
        # Only the loads run ahead. The next chunk is not entered yet, as in the forward kernel: its pairs and its kept
        # values would need a second place in shared memory.
        next_words = self.fetch(jnp.maximum(chunk - 1, 0))
        self.enter(chunk, words)
        if self.single:
            states = self.walk_slice(chunk, 0, words, self.rates, *states)
        else:
            # The sums over states of equations 5, 15 and 17 grow slice by slice.
            zeros = [self.w.full(0.0)] * self.tiling.edge_channels
            self.store_edge_values("sum_y", zeros)
            self.store_edge_pairs("sum_pairs", zeros, zeros)

            def walk(slice_index):
                dstates, dA = (self.load_shared_states(name, slice_index) for name in ("dstates", "dA"))
                rates = self.load_rates(slice_index)
                slice_words = self.fetch_slice(chunk, slice_index)
                dstates, dA = self.walk_slice(chunk, slice_index, slice_words, rates, dstates, dA)
                self.store_shared_states("dstates", slice_index, dstates)
                self.store_shared_states("dA", slice_index, dA)

            self.over_slices(walk)
        return next_words, self.leave(chunk, words, totals), states

    def kept_index(self, name: str) -> jax.Array:
        """Where the thread keeps one of `_KEPT` for its channels."""
        return (_KEPT.index(name) * THREADS + self.place.thread) * self.tiling.edge_channels

    def enter(self, chunk: jax.Array, words: dict[str, Any]) -> None:
        """Computes what the recurrence needs of the sequences."""
        x, dt, dy = (widen(words[name], self.inputs[name].dtype) for name in ("x", "dt", "dy"))
        dt = added(dt, self.edge_constant("dt_bias"))
        starts = words["starts"][0] if "starts" in words else None
        steps, decay = self.step_sizes(chunk, dt, starts)
        # The derivative of softplus, equation 18; zero where there is no token, so padding gets no gradient.
        slopes = [sigmoid(self.w, value) if self.features.softplus else self.w.full(1.0) for value in dt]
        valid = self.is_valid(chunk)
        if valid is not None:
            slopes = [jnp.where(valid, slope, self.w.full(0.0)) for slope in slopes]
        self.w.store(self.shared["kept"], self.kept_index("dt"), steps)
        self.w.store(self.shared["kept"], self.kept_index("slope"), slopes)
        if "z" in words:
            z = widen(words["z"], self.inputs["z"].dtype)
            gates = [sigmoid(self.w, value) for value in z]
            self.w.store(self.shared["kept"], self.kept_index("gate"), gates)
            # Equation 8; from here on dy means dp.
            dy = [a * (b * c) for a, b, c in zip(dy, z, gates, strict=True)]
        # What the recurrence reads: the exponent's dt with dt x, as in the forward kernel, and dp.
        self.store_edge_pairs("pairs", decay, [a * b for a, b in zip(steps, x, strict=True)])
        self.store_edge_values("dy", dy)

    def walk_slice(self, chunk: jax.Array, slice_index, words: dict[str, Any], rates, dstates, dA):
        """Takes the gradient of a slice's states back through a chunk; returns it and the one of A."""
        self.stage_matrix("B", words["B"], offset=0)
        self.stage_matrix("C", words["C"], offset=SLICE)
        # Everything staged, here and in `enter`, is visible to the recurrence role after this.
        self.w.sync_block()
        states = self.recompute(words["states"], rates)

        def walk(i, carry):
            return self.walk_span(CHUNK // SPAN - 1 - i, rates, *carry)

        dstates, dA, _ = loop(0, CHUNK // SPAN, walk, (dstates, dA, states))
        # All warps' sums must be there before they are added, and all of B and C read before the next slice.
        self.w.sync_block()
        self.write_matrix_sums(chunk, slice_index)
        return dstates, dA

    def history_offset(self, token: int, r: int) -> int:
        """From the lane's place in the history to the state before a token of a span, of its r-th channel."""
        return token * _history_pitch(self.geometry) + r * self.place.channel_stride * SLICE

    def recompute(self, states: Sequence[Registers], rates) -> Sequence[Registers]:
        """Equation 4 through the chunk, from its stored state; keeps h_{t-1} of every token, returns the last h_t."""

        def walk(span, states):
            pairs = self.load_pairs(span)
            B = self.load_rows(span, offset=0)
            base = self.history + span * (SPAN * _history_pitch(self.geometry))
            results = []
            for r, (decay, dtx) in enumerate(pairs):
                state = list(states[r])
                for j in range(SPAN):
                    # No barrier is needed: only this lane reads it again.
                    self.w.store(self.shared["history"], base, state, offset=self.history_offset(j, r))
                    for n in range(self.tiling.states_per_lane):
                        state[n] = jnp.exp2(decay[j] * rates[r][n]) * state[n] + dtx[j] * B[j][n]
                results.append(state)
            return results

        return loop(0, CHUNK // SPAN, walk, states)

    def walk_span(self, span, rates, dstates, dA, states):
        """Equations 10 to 15 and the sums of 5 and 17, back through SPAN tokens.

        Args:
            span: its index in the chunk.
            rates: A log2(e).
            dstates: g of the last token, what later tokens contribute, for each channel of the lane.
            dA: gradient of A so far.
            states: the states after the last token.
        """
        tiling, count = self.tiling, self.tiling.states_per_lane
        pairs = self.load_pairs(span)
        dy = self.load_values("dy", span)
        B, C = (self.load_rows(span, offset=offset) for offset in (0, SLICE))
        base = self.history + span * (SPAN * _history_pitch(self.geometry))
        before = [
            [self.w.load(self.shared["history"], base, count, offset=self.history_offset(j, r)) for j in range(SPAN)]
            for r in range(tiling.rows)
        ]
        # Python lists of registers are updated in place below; copies, so that the loop's carry stays as it came.
        dstates, dA, states = ([list(values) for values in each] for each in (dstates, dA, states))
        sums: list[list[tuple]] = [[] for _ in range(tiling.rows)]
        for j in reversed(range(SPAN)):
            # Terms of equation 14: one list a state, one term for each of the lane's channels.
            dB: list[list] = [[] for _ in range(count)]
            dC: list[list] = [[] for _ in range(count)]
            for r, (decay, dtx) in enumerate(pairs):
                y, ddtx, ddecay = [], [], []
                for n in range(count):
                    # Equation 14 for C, and 5 again for the gradient of the gate.
                    dC[n].append(states[r][n] * dy[r][j])
                    y.append(states[r][n] * C[j][n])
                    # Equation 10: what the token's own output adds.
                    dstate = dstates[r][n] + dy[r][j] * C[j][n]
                    # Equation 14 for B, and the terms of 15.
                    dB[n].append(dstate * dtx[j])
                    ddtx.append(dstate * B[j][n])
                    # Equation 11; a is computed anew, because registers and shared memory have no room for it.
                    dstate = dstate * jnp.exp2(decay[j] * rates[r][n])
                    # Equations 12 and 13. At a reset dstate is 0 and decay huge but finite, so the product is 0 too.
                    dexponent = dstate * before[r][j][n]
                    dA[r][n] = dA[r][n] + decay[j] * dexponent
                    # Terms of the sum in 17, with rates for A: `leave` multiplies by ln 2.
                    ddecay.append(dexponent * rates[r][n])
                    dstates[r][n] = dstate
                # The state before this token is the one after the token that comes next.
                states[r] = list(before[r][j])
                sums[r].insert(0, (total(y), total(ddtx), total(ddecay)))
            # All 2 SLICE / S terms, B and C, go into one exchange over the lanes that keep the same states.
            index = (self.place.warp * CHUNK + span * SPAN) * (2 * SLICE) + self.matrix_sum_place()
            sum_over_channels = self.sum_over_channels([total(terms) for terms in dB + dC])
            self.w.store(self.shared["matrix_sums"], index, (sum_over_channels,), offset=j * 2 * SLICE)
        # With a single slice the sums take the place of what the span has read, dy and the pairs. Those belong to
        # channels of this warp alone, so its lanes need not wait for other warps.
        self.w.sync_warp()
        y_name, pair_name = self.sum_names
        for slot, each in zip(self.own_slots(), sums, strict=True):
            y, ddtx, ddecay = (self.sums_over_shares(values) for values in zip(*each, strict=True))
            self.add_sums(y_name, span, y, slot)
            self.add_sum_pairs(pair_name, span, ddtx, ddecay, slot)
        return dstates, dA, states

    def matrix_sum_place(self) -> jax.Array:
        """Place in a row of B next to C of the sum that `sum_over_channels` leaves in the lane."""
        # Sums are numbered as in `walk_span`: first the lane's states of B, then those of C.
        count = self.tiling.states_per_lane
        kind = self.place.lane_channel >> log2(count)
        return kind * SLICE + self.place.state + (self.place.lane_channel & (count - 1))

    @property
    def sum_names(self) -> tuple[str, str]:
        """Shared memory of the sums over states: y, and the gradients of dt x and of the exponent's dt."""
        return ("dy", "pairs") if self.single else ("sum_y", "sum_pairs")

    def write_matrix_sums(self, chunk: jax.Array, slice_index) -> None:
        """Equation 14 over the block's channels: adds the warps' sums and writes the block's; XLA adds the blocks."""
        geometry, thread = self.geometry, self.place.thread
        # EDGE_LANES threads share the row of a token, B next to C.
        count = 2 * SLICE // EDGE_LANES
        token, place = thread >> log2(EDGE_LANES), (thread & (EDGE_LANES - 1)) * count
        index = token * (2 * SLICE) + place
        by_warp = [
            self.w.load(self.shared["matrix_sums"], index, count, offset=warp * CHUNK * 2 * SLICE)
            for warp in range(WARPS)
        ]
        sums = [total(terms) for terms in zip(*by_warp, strict=True)]
        # The output is (blocks, B L, G, 2, N): the gradient of B next to that of C.
        row = self.place.block * (geometry.batch * geometry.length) + self.place.batch * geometry.length
        row = row + (chunk * CHUNK + token)
        column = (
            (self.place.group * 2 + (place >> log2(SLICE))) * geometry.states
            + slice_index * SLICE
            + (place & (SLICE - 1))
        )
        pitch = geometry.groups * 2 * geometry.states
        self.w.store(self.outputs["dmatrices"], column, sums, row=row, pitch=pitch)

    def leave(self, chunk: jax.Array, words: dict[str, Any], totals):
        """Equations 9 and 16 to 19: writes the sequences' gradients; returns the sums so far for D and dt_bias."""
        edge_count = self.tiling.edge_channels
        x, dy = (widen(words[name], self.inputs[name].dtype) for name in ("x", "dy"))
        z = widen(words["z"], self.inputs["z"].dtype) if "z" in words else None
        dt, slope, gate = (self.w.load(self.shared["kept"], self.kept_index(name), edge_count) for name in _KEPT)
        y_name, pair_name = self.sum_names
        sums_y, sum_pairs = self.load_edge_values(y_name), self.load_edge_pairs(pair_name)
        D = self.edge_constant("D")
        dx, ddt, dz = [], [], []
        dD, ddt_bias = (list(values) for values in totals)
        for i in range(edge_count):
            y, (ddtx, ddecay) = sums_y[i], sum_pairs[i]
            # Equation 8 again: with one slice, the sums for y have taken its place in shared memory.
            dgated = dy[i]
            if z is not None:
                # Equation 9, for which 5 is completed by its skip.
                if D is not None:
                    y = y + D[i] * x[i]
                dz.append(dgated * y * gate[i] * (1.0 + z[i] * (1.0 - gate[i])))
                dgated = dgated * (z[i] * gate[i])
            # Equations 17 and 18. ddecay is a sum over exponents of 2, hence ln 2.
            ddt.append((ddecay * LN_2 + ddtx * x[i]) * slope[i])
            ddt_bias[i] = ddt_bias[i] + ddt[i]
            # Equations 16 and 19.
            if D is None:
                dx.append(ddtx * dt[i])
            else:
                dx.append(ddtx * dt[i] + dgated * D[i])
                dD[i] = dD[i] + dgated * x[i]
        for name, values in (("dx", dx), ("ddt", ddt), ("dz", dz)):
            if values:
                self.store_edge(name, chunk, values)
        return dD, ddt_bias
