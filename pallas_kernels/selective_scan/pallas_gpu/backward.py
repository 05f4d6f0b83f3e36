"""The backward kernel of the selective scan on NVIDIA GPUs (Hopper and newer); docs/kernels.md explains it."""

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

# Values that the lanes at the edges compute before the recurrence and need again after it.
_KEPT = ("dt", "slope", "gate")


def scratch_types(geometry: Geometry) -> dict[str, Any]:
    """Shared memory of a block, in float32."""
    tiling = geometry.tiling
    channels = tiling.channels_per_block

    def floats(count):
        return plgpu.SMEM((count,), jnp.float32)

    scratch = common_scratch(tiling) | {
        "dy": floats(value_slots(tiling)),
        "history": floats(WARPS * (CHUNK + 1) * _history_pitch(geometry)),
        "kept": floats(len(_KEPT) * CHUNK * channels),
        "matrix_sums": floats(WARPS * CHUNK * 2 * SLICE),
    }
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
    def run(self) -> None:
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
        self.w.sync_block()
        row = part * geometry.batch + self.place.batch
        for name, values in zip(("dD", "ddt_bias"), totals, strict=True):
            if name in self.outputs:
                values = self.sums_over_tokens("matrix_sums", values)
                self.w.store(self.outputs[name], self.edge_columns(), values, row=row, pitch=geometry.width)

    def initial_dstates(self, part, slice_index) -> list[Registers]:
        """Gradient of the state that the part ends with."""
        dstates = self.load_states("dfinal_state", self.place.batch, slice_index)
        if self.tiling.parts > 1:
            rates = self.load_rates(slice_index)
            dstates = self.carried(dstates, self.tiling.parts - 1, part, rates, slice_index)
        return dstates

    def initialise(self, part, slice_index) -> None:
        self.store_shared_states("dstates", slice_index, self.initial_dstates(part, slice_index))
        self.store_shared_states("dA", slice_index, self.zeros())

    def write_states(self, part, slice_index, states) -> None:
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
        """Starts to read a slice of B, C and the state at the start of a chunk."""
        words = {name: self.load_matrix(name, chunk, slice_index) for name in ("B", "C")}
        leading = self.place.batch * self.geometry.chunks + chunk
        return words | {"states": self.load_states("checkpoints", leading, slice_index)}

    def walk_chunk(self, chunk: jax.Array, words: dict[str, Any], totals, states):
        """Takes a chunk's gradients back; the next one to come is read meanwhile."""
        next_words = self.fetch(jnp.maximum(chunk - 1, 0))
        self.enter(chunk, words)
        if self.single:
            states = self.walk_slice(chunk, 0, words, self.rates, *states)
        else:
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
        return (_KEPT.index(name) * THREADS + self.place.thread) * self.tiling.edge_channels

    def enter(self, chunk: jax.Array, words: dict[str, Any]) -> None:
        """Computes what the recurrence needs of the sequences."""
        x, dt, dy = (widen(words[name], self.inputs[name].dtype) for name in ("x", "dt", "dy"))
        dt = added(dt, self.edge_constant("dt_bias"))
        starts = words["starts"][0] if "starts" in words else None
        steps, decay = self.step_sizes(chunk, dt, starts)
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
            dy = [a * (b * c) for a, b, c in zip(dy, z, gates, strict=True)]
        self.store_edge_pairs("pairs", decay, [a * b for a, b in zip(steps, x, strict=True)])
        self.store_edge_values("dy", dy)

    def walk_slice(self, chunk: jax.Array, slice_index, words: dict[str, Any], rates, dstates, dA):
        """Takes the gradient of a slice's states back through a chunk; returns it and the one of A."""
        self.stage_matrix("B", words["B"], offset=0)
        self.stage_matrix("C", words["C"], offset=SLICE)
        self.w.sync_block()
        states = self.recompute(words["states"], rates)

        def walk(i, carry):
            return self.walk_span(CHUNK // SPAN - 1 - i, rates, *carry)

        dstates, dA, _ = loop(0, CHUNK // SPAN, walk, (dstates, dA, states))
        self.w.sync_block()
        self.write_matrix_sums(chunk, slice_index)
        return dstates, dA

    def history_offset(self, token: int, r: int) -> int:
        return token * _history_pitch(self.geometry) + r * self.place.channel_stride * SLICE

    def recompute(self, states: Sequence[Registers], rates) -> Sequence[Registers]:
        """Runs the chunk forward and writes down the states before every token; returns the last."""

        def walk(span, states):
            pairs = self.load_pairs(span)
            B = self.load_rows(span, offset=0)
            base = self.history + span * (SPAN * _history_pitch(self.geometry))
            results = []
            for r, (decay, dtx) in enumerate(pairs):
                state = list(states[r])
                for j in range(SPAN):
                    self.w.store(self.shared["history"], base, state, offset=self.history_offset(j, r))
                    for n in range(self.tiling.states_per_lane):
                        state[n] = jnp.exp2(decay[j] * rates[r][n]) * state[n] + dtx[j] * B[j][n]
                results.append(state)
            return results

        return loop(0, CHUNK // SPAN, walk, states)

    def walk_span(self, span, rates, dstates, dA, states):
        """Takes the gradient of the states back through SPAN tokens.

        Args:
            span: its index in the chunk.
            rates: A.
            dstates: gradient of the states after the last token, for each channel of the lane.
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
        dstates, dA, states = ([list(values) for values in each] for each in (dstates, dA, states))
        sums: list[list[tuple]] = [[] for _ in range(tiling.rows)]
        for j in reversed(range(SPAN)):
            dB: list[list] = [[] for _ in range(count)]
            dC: list[list] = [[] for _ in range(count)]
            for r, (decay, dtx) in enumerate(pairs):
                y, ddtx, ddecay = [], [], []
                for n in range(count):
                    dC[n].append(states[r][n] * dy[r][j])
                    y.append(states[r][n] * C[j][n])
                    dstate = dstates[r][n] + dy[r][j] * C[j][n]
                    dB[n].append(dstate * dtx[j])
                    ddtx.append(dstate * B[j][n])
                    dstate = dstate * jnp.exp2(decay[j] * rates[r][n])
                    # Gradient of the exponent dt A.
                    dexponent = dstate * before[r][j][n]
                    dA[r][n] = dA[r][n] + decay[j] * dexponent
                    ddecay.append(dexponent * rates[r][n])
                    dstates[r][n] = dstate
                states[r] = list(before[r][j])
                sums[r].insert(0, (total(y), total(ddtx), total(ddecay)))
            index = (self.place.warp * CHUNK + span * SPAN) * (2 * SLICE) + self.matrix_sum_place()
            sum_over_channels = self.sum_over_channels([total(terms) for terms in dB + dC])
            self.w.store(self.shared["matrix_sums"], index, (sum_over_channels,), offset=j * 2 * SLICE)
        # With a single slice the sums take the place of what the span has read, dy and the pairs.
        self.w.sync_warp()
        y_name, pair_name = self.sum_names
        for slot, each in zip(self.own_slots(), sums, strict=True):
            y, ddtx, ddecay = (self.sums_over_shares(values) for values in zip(*each, strict=True))
            self.add_sums(y_name, span, y, slot)
            self.add_sum_pairs(pair_name, span, ddtx, ddecay, slot)
        return dstates, dA, states

    def matrix_sum_place(self) -> jax.Array:
        """Place in a row of B next to C of the sum that `sum_over_channels` leaves in the lane."""
        count = self.tiling.states_per_lane
        kind = self.place.lane_channel >> log2(count)
        return kind * SLICE + self.place.state + (self.place.lane_channel & (count - 1))

    @property
    def sum_names(self) -> tuple[str, str]:
        """Shared memory of the sums over states: y, and the gradients of dt x and of the exponent's dt."""
        return ("dy", "pairs") if self.single else ("sum_y", "sum_pairs")

    def write_matrix_sums(self, chunk: jax.Array, slice_index) -> None:
        """Adds up the warps' parts of the gradients of B and C and writes the block's."""
        geometry, thread = self.geometry, self.place.thread
        # EDGE_LANES threads share the row of a token, B next to C.
        count = 2 * SLICE // EDGE_LANES
        token, place = thread >> log2(EDGE_LANES), (thread & (EDGE_LANES - 1)) * count
        index = token * (2 * SLICE) + place
        parts = [
            self.w.load(self.shared["matrix_sums"], index, count, offset=warp * CHUNK * 2 * SLICE)
            for warp in range(WARPS)
        ]
        sums = [total(terms) for terms in zip(*parts, strict=True)]
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
        """Writes the gradients of the sequences; returns the sums over tokens for D and dt_bias."""
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
            dgated = dy[i]
            if z is not None:
                if D is not None:
                    y = y + D[i] * x[i]
                dz.append(dgated * y * gate[i] * (1.0 + z[i] * (1.0 - gate[i])))
                dgated = dgated * (z[i] * gate[i])
            ddt.append((ddecay * LN_2 + ddtx * x[i]) * slope[i])
            ddt_bias[i] = ddt_bias[i] + ddt[i]
            if D is None:
                dx.append(ddtx * dt[i])
            else:
                dx.append(ddtx * dt[i] + dgated * D[i])
                dD[i] = dD[i] + dgated * x[i]
        for name, values in (("dx", dx), ("ddt", ddt), ("dz", dz)):
            if values:
                self.store_edge(name, chunk, values)
        return dD, ddt_bias
