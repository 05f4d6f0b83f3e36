"""What the Triton kernels of the selective scan are compiled for."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
    """Sizes, options, and the shape of a tile: one compile-time parameter of the kernels, which read its attributes.

    Attributes:
        BATCH, LENGTH, CHANNELS, STATES, GROUPS: sizes of the arguments.
        B_GROUPS, C_GROUPS: of B and C; 0 for a matrix that is constant over time.
        SOFTPLUS: whether softplus is part of equation 1.
        ZOH: whether equation 3 is "zoh", not "euler".
        HAS_D, HAS_Z, HAS_BIAS, HAS_SEGMENTS, HAS_INITIAL: whether an argument is there.
        HAS_CHECKPOINTS: whether the forward kernel stores the states at the starts of chunks.
        T, R, E, P: tokens of a tile, states of a channel in a lane, channels of a block, lanes that share a channel.
        CHUNK: tiles from one checkpoint to the next.
    """

    BATCH: int
    LENGTH: int
    CHANNELS: int
    STATES: int
    GROUPS: int
    B_GROUPS: int
    C_GROUPS: int
    SOFTPLUS: bool
    ZOH: bool
    HAS_D: bool
    HAS_Z: bool
    HAS_BIAS: bool
    HAS_SEGMENTS: bool
    HAS_INITIAL: bool
    HAS_CHECKPOINTS: bool
    T: int
    R: int
    E: int
    P: int
    CHUNK: int

    @property
    def channels_per_group(self) -> int:
        return self.CHANNELS // self.GROUPS

    @property
    def blocks(self) -> int:
        """Of a group; no block of channels crosses one."""
        return -(-self.channels_per_group // self.E)

    @property
    def programs(self) -> int:
        """Of a kernel: one for each batch row and block."""
        return self.BATCH * self.GROUPS * self.blocks

    @property
    def tiles(self) -> int:
        """Of a sequence."""
        return -(-self.LENGTH // self.T)

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return -(-self.tiles // self.CHUNK)

    @property
    def kept_states(self) -> int:
        """Numbers that a program of the backward kernel keeps for a tile: the states of its channels, and padding."""
        return self.E * self.R * self.P
