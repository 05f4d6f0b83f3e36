"""What the GPU kernels of the selective scan share: access to memory in each of a thread's two roles (`place.py`).

The roles exchange values through shared memory. Numbers of equations are those of README.md one folder up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.register_math import LOG2_E, Registers, added, loop, softplus
from pallas_kernels.common.warpgroup import LANES, WARPS, Warpgroup, widen
from pallas_kernels.selective_scan.kernel_inputs import Features
from pallas_kernels.selective_scan.pallas_gpu.geometry import (
    CHUNK,
    CONSTANT_PADDING,
    CONSTANTS,
    EDGE_LANES,
    EDGE_STATES,
    MATRIX_PITCH,
    PAIRED,
    RESET,
    SLICE,
    SLOT,
    SPAN,
    Geometry,
    log2,
    slot_position,
)
from pallas_kernels.selective_scan.pallas_gpu.place import Place


class Kernel:
    """Access to memory that is alike in all kernels of a scan.

    Attributes:
        geometry, features, w, inputs, outputs, shared: what the kernel was called with.
        tiling: that of the geometry.
        lanes: roles of the threads.
        single: all states fit into one slice; then states, A, B and C stay where they are from chunk to chunk.
    """

    def __init__(
        self,
        geometry: Geometry,
        features: Features,
        w: Warpgroup,
        inputs: dict[str, Any],
        outputs: dict[str, Any],
        shared: dict[str, Any],
    ):
        self.w, self.geometry, self.features = w, geometry, features
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        self.tiling = geometry.tiling
        self.place = Place(w, self.tiling, geometry)
        self.single = geometry.slices == 1

    def over_slices(self, body: Callable[[Any], None]) -> None:
        """Calls body(slice_index) for every slice."""
        # A static index lets the usual case, N <= SLICE, compile without a loop and with constant addresses.
        if self.single:
            body(0)
        else:
            loop(0, self.geometry.slices, lambda i, _: body(i), None)

    def token_row(self, chunk: jax.Array) -> jax.Array:
        """Row of the lane's token in sequences and matrices."""
        return self.place.batch * self.geometry.length + (chunk * CHUNK + self.place.token)

    def edge_columns(self) -> jax.Array:
        """First channel of the lane at the edges, among all channels."""
        return self.place.first_channel + self.place.edge_channel

    def keep_constants(self) -> None:
        """Copies D and dt_bias to shared memory, every thread its own channels, whichever are given."""
        # In registers they would be alive during the recurrence, which has none to spare. No barrier: a thread reads
        # back only what it has written itself.
        count, pitch = self.tiling.edge_channels, self.geometry.width
        for i, name in enumerate(CONSTANTS):
            if name in self.inputs:
                values = self.w.load(self.inputs[name], self.edge_columns(), count, row=self.place.zero, pitch=pitch)
                self.w.store(self.shared["constants"], self._constants_index(), values, offset=i * self._constants)

    def edge_constant(self, name: str) -> Registers | None:
        """A value for each channel of the thread at the edges; None if the argument is missing."""
        if name not in self.inputs:
            return None
        offset = CONSTANTS.index(name) * self._constants
        return self.w.load(self.shared["constants"], self._constants_index(), self.tiling.edge_channels, offset=offset)

    @property
    def _constants(self) -> int:
        return EDGE_LANES * (self.tiling.edge_channels + CONSTANT_PADDING)

    def _constants_index(self) -> jax.Array:
        return (self.place.thread & (EDGE_LANES - 1)) * (self.tiling.edge_channels + CONSTANT_PADDING)

    def load_edge(self, chunk: jax.Array, names: Sequence[str]) -> dict[str, Registers]:
        """Words of a chunk of sequences; "starts" has one value a token, the others a row of channels."""
        row = self.token_row(chunk)
        words: dict[str, Registers] = {}
        for name in names:
            # One number serves all channels of a token: every one of its EDGE_LANES threads reads it.
            if name == "starts":
                words[name] = self.w.load(self.inputs[name], self.place.zero, 1, row=row, pitch=1)
            elif name in self.inputs:
                count, pitch = self.tiling.edge_channels, self.geometry.width
                words[name] = self.w.load(self.inputs[name], self.edge_columns(), count, row=row, pitch=pitch)
        return words

    def store_edge(self, name: str, chunk: jax.Array, values: Registers) -> None:
        """Writes the lane's channels of its token of an output."""
        row = self.token_row(chunk)
        self.w.store(self.outputs[name], self.edge_columns(), values, row=row, pitch=self.geometry.width)

    def state_rows(self, leading: jax.Array) -> list[jax.Array]:
        """Rows of the lane's channels in an array (leading, G F, N), such as (B, G F, N) or (B chunks, G F, N)."""
        first = leading * self.geometry.width + (self.place.first_channel + self.place.channel)
        return [first + r * self.place.channel_stride for r in range(self.tiling.rows)]

    def load_states(self, name: str, leading: jax.Array, slice_index) -> list[Registers]:
        """The lane's states of a slice from an input, for each of its channels."""
        column = self.place.state + slice_index * SLICE
        count, pitch = self.tiling.states_per_lane, self.geometry.states
        rows = self.state_rows(leading)
        return [self.w.load(self.inputs[name], column, count, row=row, pitch=pitch) for row in rows]

    def load_rates(self, slice_index) -> list[Registers]:
        """A log2(e) of the lane's states of a slice, for each of its channels: equation 2 is then exp2(dt * rate)."""
        rates = self.load_states("A", self.place.zero, slice_index)
        return [[rate * LOG2_E for rate in values] for values in rates]

    def store_states(self, name: str, leading: jax.Array, slice_index, states: Sequence[Registers]) -> None:
        """Writes the lane's states of a slice to an output."""
        column = self.place.state + slice_index * SLICE
        for row, values in zip(self.state_rows(leading), states, strict=True):
            self.w.store(self.outputs[name], column, values, row=row, pitch=self.geometry.states)

    def zeros(self) -> list[Registers]:
        """Zeros in the place of the lane's states."""
        return [[self.w.full(0.0)] * self.tiling.states_per_lane for _ in range(self.tiling.rows)]

    def shared_states_index(self, slice_index) -> jax.Array:
        """Place of the lane's states of a slice: shared memory holds (slices, channels of the block, SLICE)."""
        place = self.place
        return slice_index * (self.tiling.channels_per_block * SLICE) + place.channel * SLICE + place.state

    def load_shared_states(self, name: str, slice_index) -> list[Registers]:
        """The lane's states of a slice from shared memory."""
        index, count = self.shared_states_index(slice_index), self.tiling.states_per_lane
        offsets = [r * self.place.channel_stride * SLICE for r in range(self.tiling.rows)]
        return [self.w.load(self.shared[name], index, count, offset=offset) for offset in offsets]

    def store_shared_states(self, name: str, slice_index, states: Sequence[Registers]) -> None:
        """Writes the lane's states of a slice to shared memory."""
        index = self.shared_states_index(slice_index)
        for r, values in enumerate(states):
            self.w.store(self.shared[name], index, values, offset=r * self.place.channel_stride * SLICE)

    @property
    def slots(self) -> int:
        """Size of a slot for every channel of the block, see `slot_position`."""
        return slot_position(self.tiling.channels_per_block)

    def own_slots(self) -> list[tuple[jax.Array, int]]:
        """Slots of the lane's channels in the recurrence, as a position and an offset known in advance."""
        first = slot_position(self.place.channel)
        return [(first, slot_position(r * self.place.channel_stride)) for r in range(self.tiling.rows)]

    def edge_slots(self) -> list[tuple[jax.Array, int]]:
        """The same for the thread's channels at the edges."""
        first = slot_position(self.place.edge_channel)
        return [(first, slot_position(i)) for i in range(self.tiling.edge_channels)]

    def store_edge_values(self, name: str, values: Registers) -> None:
        """Writes a value for each of the thread's channels to shared memory, for `load_values`."""
        # The SPAN values of a channel's span are neighbours, so the recurrence reads them in one access of 16 bytes.
        token = self.place.token
        row = (token >> log2(SPAN)) * self.slots + (token & (SPAN - 1))
        for (slot, offset), value in zip(self.edge_slots(), values, strict=True):
            self.w.store(self.shared[name], row + slot, (value,), offset=offset)

    def load_edge_values(self, name: str) -> list[jax.Array]:
        """Reads what the recurrence wrote, for each of the thread's channels."""
        token = self.place.token
        row = (token >> log2(SPAN)) * self.slots + (token & (SPAN - 1))
        return [self.w.load(self.shared[name], row + slot, 1, offset=offset)[0] for slot, offset in self.edge_slots()]

    def load_values(self, name: str, span) -> list[Registers]:
        """Values of the tokens of a span, for each of the lane's channels."""
        row = span * self.slots
        return [self.w.load(self.shared[name], row + slot, SPAN, offset=offset) for slot, offset in self.own_slots()]

    def add_sums(self, name: str, span, sums: Registers, slot: tuple[jax.Array, int]) -> None:
        """Writes the lane's sums over states for one of its channels, or adds them to those of other slices."""
        index = span * self.slots + slot[0] + self.place.first_sum
        self._write_sums(name, index, sums, slot[1])

    def add_sum_pairs(self, name: str, span, first: Registers, second: Registers, slot: tuple[jax.Array, int]) -> None:
        """Writes or adds the lane's pairs of sums, the two of a token next to each other, for `load_edge_pairs`."""
        token = self.place.first_sum
        index = (span * (SPAN // PAIRED) + (token >> log2(PAIRED))) * self.slots + slot[0] + (token & (PAIRED - 1)) * 2
        self._write_sums(name, index, [value for pair in zip(first, second, strict=True) for value in pair], slot[1])

    def _write_sums(self, name: str, index: jax.Array, sums: Registers, offset: int) -> None:
        # Equation 5 sums over all states: a later slice adds to what the earlier ones left. Memory was zeroed before
        # the first, and only this lane (or copies of it, with equal values) touches the address.
        if not self.single:
            sums = added(sums, self.w.load(self.shared[name], index, len(sums), offset=offset))
        self.w.store(self.shared[name], index, sums, offset=offset)

    def store_edge_pairs(self, name: str, first: Registers, second: Registers) -> None:
        """Writes a pair for each of the thread's channels to shared memory, for `load_pairs`."""
        token = self.place.token
        row = (token >> log2(PAIRED)) * self.slots + (token & (PAIRED - 1)) * 2
        for (slot, offset), pair in zip(self.edge_slots(), zip(first, second, strict=True), strict=True):
            self.w.store(self.shared[name], row + slot, pair, offset=offset)

    def load_edge_pairs(self, name: str) -> list[Registers]:
        """Reads what the recurrence wrote, for each of the thread's channels."""
        token = self.place.token
        row = (token >> log2(PAIRED)) * self.slots + (token & (PAIRED - 1)) * 2
        return [self.w.load(self.shared[name], row + slot, 2, offset=offset) for slot, offset in self.edge_slots()]

    def load_pairs(self, span) -> list[tuple[Registers, Registers]]:
        """The pairs of the tokens of a span, as first and second values for each of the lane's channels."""
        pairs: list[tuple[Registers, Registers]] = []
        for slot, offset in self.own_slots():
            # Two accesses of 16 bytes bring four tokens; in each, first and second values alternate.
            index = span * (2 * self.slots) + slot
            early, late = (
                self.w.load(self.shared["pairs"], index, SLOT, offset=offset + i * self.slots) for i in range(2)
            )
            pairs.append(((*early[0::2], *late[0::2]), (*early[1::2], *late[1::2])))
        return pairs

    def load_matrix(self, name: str, chunk: jax.Array, slice_index) -> Registers:
        """Words of the thread's EDGE_STATES states of the row of its token in B or C."""
        # Read once per block in the edge role, then shared by all its channels: `stage_matrix`.
        column = self.place.group * self.geometry.states + slice_index * SLICE + self.place.edge_state
        pitch = self.geometry.groups * self.geometry.states
        return self.w.load(self.inputs[name], column, EDGE_STATES, row=self.token_row(chunk), pitch=pitch)

    def stage_matrix(self, name: str, words: Registers, *, offset: int) -> None:
        """Writes what `load_matrix` brought, in float32, to the block's copy of B (offset 0) or C (SLICE)."""
        index = self.place.token * MATRIX_PITCH + self.place.edge_state
        self.w.store(self.shared["matrices"], index, widen(words, self.inputs[name].dtype), offset=offset)

    def load_rows(self, span, *, offset: int) -> list[Registers]:
        """The lane's states of B (offset 0) or C (SLICE) for the tokens of a span."""
        # Lanes that share a state read the same address, which shared memory serves to all of them at once.
        index = span * (SPAN * MATRIX_PITCH) + self.place.state
        count = self.tiling.states_per_lane
        matrices = self.shared["matrices"]
        return [self.w.load(matrices, index, count, offset=offset + i * MATRIX_PITCH) for i in range(SPAN)]

    def is_valid(self, chunk: jax.Array) -> jax.Array | None:
        """Whether the lane's token exists; None if all do."""
        # A sequence of whole chunks needs no masks, and the kernel is compiled without them.
        if self.geometry.valid_length == self.geometry.length:
            return None
        return chunk * CHUNK + self.place.token < self.geometry.valid_length

    def step_sizes(
        self, chunk: jax.Array, dt: Registers, starts: jax.Array | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The steps of equation 1, zero for tokens that do not exist; and the same, huge where a segment starts.

        Args:
            chunk: index of the chunk.
            dt: with its bias, a value for each of the lane's channels.
            starts: not zero where a segment starts; None if there are none.
        """
        steps = [softplus(value, self.w.reciprocal) if self.features.softplus else value for value in dt]
        # A step of zero gives a = 1 and u = 0 in equations 2 and 3: padding leaves the state as it is.
        valid = self.is_valid(chunk)
        if valid is not None:
            steps = [jnp.where(valid, step, self.w.full(0.0)) for step in steps]
        if starts is None:
            return steps, steps
        # Equation 2's a = 0 as an exponent that underflows; equation 3 still takes the true step.
        return steps, [jnp.where(starts != 0, self.w.full(RESET), step) for step in steps]

    def carried(self, states: list[Registers], first, last, rates: Sequence[Registers], slice_index) -> list[Registers]:
        """States after the parts first, first + 1, .., last - 1 of the sequence (or first, first - 1, .., last + 1).

        Equation 21, part by part. The edge kernel has written h' to "part_states" and s to "part_steps". Every block
        takes the parts in the same order, so the result does not depend on which block runs when.
        """
        count = jnp.abs(last - first)
        direction = jnp.where(last > first, 1, -1)

        def advance(i, states):
            part = first + i * direction
            # The order of parts is the same in either direction of time; only the way through them differs.
            leading = self.place.zero + part * self.geometry.batch + self.place.batch
            local = self.load_states("part_states", leading, slice_index)
            result = []
            for r, row in enumerate(self.state_rows(leading)):
                (total,) = self.w.load(self.inputs["part_steps"], self.place.zero, 1, row=row, pitch=1)
                moved = zip(rates[r], states[r], local[r], strict=True)
                result.append([jnp.exp2(total * rate) * state + more for rate, state, more in moved])
            return result

        return loop(0, count, advance, states)

    def sums_over_shares(self, values: Registers) -> list[jax.Array]:
        """The sum over states in equation 5 (or 15, 17): SPAN values, one a token, over the lanes of a channel.

        Each exchange halves the number of values that a lane is responsible for, until one is left; further exchanges
        make copies of it. For SPAN = S = 4 that is 3 shuffles for 4 sums, where a sum by itself takes 2.

        Returns:
            The sums of the tokens `lanes.first_sum` and following.
        """
        return self._exchange(values, self.place.share, self.tiling.lanes_per_channel)

    def sum_over_channels(self, values: Registers) -> jax.Array:
        """Sums 32 / S values over the lanes of a warp that keep the same states; lane_channel i has the i-th sum."""
        (total,) = self._exchange(
            values, self.place.lane_channel, LANES // self.tiling.lanes_per_channel, scale=self.tiling.lanes_per_channel
        )
        return total

    def _exchange(self, values: Registers, position: jax.Array, lanes: int, *, scale: int = 1) -> list[jax.Array]:
        """Sums values over `lanes` lanes, `scale` apart, of which the thread is number `position`.

        The lane with position p ends with the p-th of equally many shares of the sums.
        """
        values = list(values)
        mask = lanes // 2
        while mask:
            half = len(values) // 2
            # A lane keeps the half that its bit of `position` names, and gives the other half to its partner.
            if half:
                upper = (position & mask) != 0
                kept = [jnp.where(upper, values[half + i], values[i]) for i in range(half)]
                sent = [jnp.where(upper, values[i], values[half + i]) for i in range(half)]
            else:
                kept, sent = values, values
            values = [k + self.w.shuffle_xor(s, mask * scale) for k, s in zip(kept, sent, strict=True)]
            mask //= 2
        return values

    def sums_over_tokens(self, name: str, values: Registers) -> Registers:
        """Sums over the threads that have the same channels at the edges; `name` is shared memory for THREADS values.

        All threads must have passed a barrier since the memory was used last.
        """
        totals = []
        for value in values:
            # Threads with equal thread % EDGE_LANES have the same channels: first within the warp, over the bits of the
            # lane's number from EDGE_LANES up, then over the warps by way of shared memory.
            for mask in (1 << bit for bit in range(log2(EDGE_LANES), log2(LANES))):
                value = value + self.w.shuffle_xor(value, mask)
            self.w.store(self.shared[name], self.place.thread, (value,))
            self.w.sync_block()
            index = self.place.thread & (EDGE_LANES - 1)
            parts = [self.w.load(self.shared[name], index, 1, offset=warp * LANES)[0] for warp in range(WARPS)]
            totals.append((parts[0] + parts[1]) + (parts[2] + parts[3]))
            # The next value is written where this one is read.
            self.w.sync_block()
        return totals
