"""Choice of the blocks of the TPU kernels, by generation of the chip.

The compiler's schedules say what is best: many tiles in a block, because what a span costs besides its tiles is then
paid once for all of them. `python benchmarks/run_tpu_static.py --variants` makes the schedules; their figures are in
`benchmarks/results/tpu_static_2026-11-24.md`.
"""

import dataclasses

from pallas_kernels.common.devices import entry_of_kind
from pallas_kernels.common.rounding import ceil_div, round_up
from pallas_kernels.common.tpu_tiles import LANES, SPAN, choose_tiles
from pallas_kernels.selective_scan.pallas_tpu.geometry import SLICE, Geometry, Tiling

# Tokens x states of a block, at most. The backward kernel keeps 2 x 128 float32 sums on the chip for each of them, the
# lanes of the gradients of B and C: 4 MiB.
_BLOCK_STATES = 2**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What a generation of TPUs has room for.

    Attributes:
        tokens: largest number of tokens in a block.
        tiles: largest number of tiles in a block with 16 states; with more states it is less.
        strip_bytes: largest size of a strip's state. It stays on the chip, as do its gradient, A and the gradient of A.
        vmem_bytes: memory on the chip that a kernel may take.
        cores: number of cores that share a device's work.
    """

    tokens: int
    tiles: int
    strip_bytes: int
    vmem_bytes: int
    cores: int


_V5E = Generation(tokens=128, tiles=12, strip_bytes=2**19, vmem_bytes=48 * 2**20, cores=1)
# By what `device.device_kind` contains; the first match counts, so "v5 lite" stands before "v5" (v5p).
GENERATIONS = {
    "v4": Generation(tokens=64, tiles=6, strip_bytes=2**18, vmem_bytes=15 * 2**20, cores=2),
    "v5 lite": _V5E,
    "v5": dataclasses.replace(_V5E, cores=2),
    "v6 lite": _V5E,
    "TPU7": _V5E,
}


def generation(device_kind: str) -> Generation:
    """The entry of a device by its kind, such as "TPU v5 lite"; of v5e if there is none."""
    return entry_of_kind(GENERATIONS, device_kind, default="v5 lite")


def choose_geometry(chip: Generation, *, batch: int, length: int, groups: int, channels: int, states: int) -> Geometry:
    """Chooses how a scan is cut into blocks that fit on the chip, and pads its sizes to whole blocks.

    Args:
        chip: what the chip has room for.
        batch: B.
        length: L.
        groups: G.
        channels: F, number of channels in a group.
        states: N.

    Returns:
        The padded sizes and the tiling.
    """
    # 8 rows are a register: fewer states than that gain nothing, and 9 to 16 take a whole slice.
    states = round_up(states, SLICE if states > SLICE // 2 else SLICE // 2)
    tokens = min(chip.tokens, round_up(length, SPAN), max(1, _BLOCK_STATES // (states * SPAN)) * SPAN)
    # As many strips as make their state fit, and work for every core.
    strips = max(ceil_div(channels * states * 4, chip.strip_bytes), chip.cores if batch * groups % chip.cores else 1)
    tiles_of_strip = ceil_div(channels, strips * LANES)
    # Twice the states, half the tiles: the memory of a block stays the same.
    tiles = choose_tiles(tiles_of_strip, most=min(chip.tiles, max(1, chip.tiles * SLICE // states)))
    return Geometry(
        batch=batch,
        length=round_up(length, tokens),
        states=states,
        groups=groups,
        strips_per_group=strips,
        channels=strips * round_up(tiles_of_strip, tiles) * LANES,
        tiling=Tiling(tokens=tokens, tiles=tiles),
    )
