"""What the TPU kernels of the ops run through: passes of their loops, and bytes."""

import dataclasses
import math

from pallas_kernels.causal_conv1d.pallas_tpu import geometry as convolution
from pallas_kernels.common.rounding import round_up
from pallas_kernels.common.tpu_tiles import LANES, SPAN
from pallas_kernels.selective_scan.pallas_tpu.tilings import Generation, choose_geometry
from pallas_kernels.ssd.pallas_tpu import geometry as duality

DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel runs through.

    Attributes:
        steps: of its grid.
        spans: of tokens in a step.
        size: tokens times channels, in units of 1024.
        memory: bytes that it reads and writes; the last axis of an array takes whole registers.
        last_loop: how often the last loop runs, by step and span; 1 unless it is for the last block only.
    """

    steps: int
    spans: int
    size: float
    memory: int
    last_loop: float = 1.0


def scan_work(op: str, shape: tuple[int, ...], chip: Generation) -> dict[str, Work]:
    """The kernels of the selective scan and of its edge states."""
    batch, length, channels, states = shape
    sizes = {"batch": batch, "length": length, "groups": 1, "channels": channels, "states": states}
    geometry = choose_geometry(chip, **sizes)
    arrays = {
        "selective_scan_final_state": {"forward": {"sequence": 2, "matrices": 1, "state": 1}},
        "selective_scan_initial_cotangent": {"backward": {"sequence": 3, "matrices": 1, "state": 1}},
    }.get(op) or {
        "forward": {"sequence": 4, "matrices": 1, "checkpoints": 1, "state": 1},
        "backward": {"sequence": 7, "matrices": 1, "checkpoints": 1, "dmatrices": 1, "state": 3},
    }
    return {
        direction: Work(
            steps=math.prod(geometry.grid),
            spans=geometry.tiling.tokens // SPAN,
            size=batch * length * channels / 1024,
            memory=sum(
                count * array_bytes(geometry.shape(kind), 2 if kind in ("sequence", "matrices") else 4)
                for kind, count in kinds.items()
            ),
            last_loop=1 / geometry.blocks if op == "selective_scan" and direction == "backward" else 1.0,
        )
        for direction, kinds in arrays.items()
    }


def convolution_work(shape: tuple[int, ...]) -> dict[str, Work]:
    """The kernels of the convolution."""
    batch, length, channels, width = shape
    geometry = convolution.choose_geometry(batch=batch, length=length, channels=channels, width=width)
    return {
        direction: Work(
            steps=math.prod(geometry.grid),
            spans=geometry.spans,
            size=batch * length * channels / 1024,
            memory=sequences * array_bytes(geometry.shape("sequence"), 2),
        )
        for direction, sequences in zip(DIRECTIONS, (2, 3), strict=True)
    }


def ssd_work(shape: tuple[int, ...], chip: duality.Generation) -> dict[str, Work]:
    """The kernels of state-space duality."""
    batch, length, heads, width, states = shape
    sizes = {"batch": batch, "length": length, "heads": heads, "groups": 1, "width": width, "states": states}
    geometry = duality.choose_geometry(chip, **sizes, packed=False, exact=False)
    arrays = {
        "forward": {"values": 2, "keys": 2, "vectors": 1, "checkpoints": 1, "state": 1},
        "backward": {"values": 3, "keys": 2, "dkeys": 2, "vectors": 1, "dvectors": 1, "checkpoints": 1, "state": 2},
    }
    narrow = ("values", "keys", "dkeys", "checkpoints")
    return {
        direction: Work(
            steps=math.prod(geometry.grid),
            spans=1,
            size=batch * length * heads * width / 1024,
            memory=sum(
                count * array_bytes(geometry.shape(kind), 2 if kind in narrow else 4) for kind, count in kinds.items()
            ),
        )
        for direction, kinds in arrays.items()
    }


def array_bytes(shape: tuple[int, ...], item: int) -> int:
    """Bytes of an array."""
    *leading, last = shape
    return math.prod(leading) * round_up(last, LANES) * item


def works_of(op: str, kind: str, shape: tuple[int, ...], entry: Generation) -> dict[str, Work]:
    """What the kernels of an op run through, by pass."""
    if op == "ssd":
        return ssd_work(shape, duality.generation(kind))
    return convolution_work(shape) if op == "causal_conv1d" else scan_work(op, shape, entry)
