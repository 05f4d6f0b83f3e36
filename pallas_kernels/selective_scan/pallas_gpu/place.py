"""The place of a thread in the GPU kernels of the selective scan.

A block owns some channels and walks its part of the sequence in chunks of CHUNK tokens. Its threads have two roles:

- In the recurrence, a warp has CW = 32 / S * R channels. S lanes share R of them, and each lane keeps SLICE / S states
  of every one of its channels in registers. (More than SLICE states are processed slice by slice.)
- At the edges of a chunk, where sequences are read and written and softplus and gates are computed, EDGE_LANES
  neighbouring threads share a token, and each has an equal share of the block's channels, so that memory is accessed
  in whole lines.
"""

import jax

from pallas_kernels.common.warpgroup import LANES, Warpgroup
from pallas_kernels.selective_scan.pallas_gpu.geometry import EDGE_LANES, EDGE_STATES, SPAN, Geometry, Tiling, log2


class Place:
    """Where each thread works, as int32 arrays of one value a thread.

    Attributes:
        thread, warp, lane: indices of the thread in the block, its warp, and the lane in the warp.
        channel: first channel of the lane in the recurrence, counted in the block; the others are `channel_stride`
            apart.
        share: index among the lanes of that channel.
        state: first state of the slice that the lane keeps.
        token: in the chunk, at the edges.
        edge_channel: first channel at the edges, counted in the block.
        first_channel: first channel of the block among all channels.
        group, batch, block: those of the block; a group of channels shares B and C.
    """

    def __init__(self, w: Warpgroup, tiling: Tiling, geometry: Geometry):
        self.thread = w.thread_index()
        # A scalar becomes an array with one value a thread by adding it to this zero; Mosaic GPU has no other way.
        zero = self.thread & 0
        self.zero = zero
        self.warp = self.thread >> log2(LANES)
        self.lane = self.thread & (LANES - 1)
        # A lane's R channels lie apart, so that in each of them the lanes of a warp touch neighbouring channels.
        self.channel_stride = LANES // tiling.lanes_per_channel
        self.lane_channel = self.lane >> log2(tiling.lanes_per_channel)
        self.share = self.lane & (tiling.lanes_per_channel - 1)
        self.state = self.share * tiling.states_per_lane
        # The second role: a row of a sequence is read by EDGE_LANES neighbours, so each reads a contiguous run of
        # bytes.
        self.token = self.thread >> log2(EDGE_LANES)
        warp_channel = self.warp * tiling.channels_per_warp
        self.channel = warp_channel + self.lane_channel
        self.edge_channel = (self.thread & (EDGE_LANES - 1)) * tiling.edge_channels
        self.group = zero + jax.lax.axis_index("group")
        self.batch = zero + jax.lax.axis_index("batch")
        self.block = zero + jax.lax.axis_index("block")
        self.first_channel = self.group * geometry.channels + self.block * tiling.channels_per_block
        # `sums_over_shares` leaves SPAN sums, spread over S lanes: with S <= SPAN a lane has SPAN / S of them, from
        # this one on; with more, S / SPAN lanes have the same one and write the same value.
        self.first_sum = (self.share * SPAN) >> log2(tiling.lanes_per_channel)

    @property
    def edge_state(self) -> jax.Array:
        """First state of the slice that the thread reads of its token's row of B or C."""
        return (self.thread & (EDGE_LANES - 1)) * EDGE_STATES
