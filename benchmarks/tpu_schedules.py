"""TPU kernels by numbers: the schedule, read from the files that the compiler dumps, and what a kernel runs through."""

import dataclasses
import math
import re
from pathlib import Path

from pallas_kernels.causal_conv1d.pallas_tpu import geometry as convolution
from pallas_kernels.common.rounding import round_up
from pallas_kernels.common.tpu_tiles import LANES, SPAN
from pallas_kernels.selective_scan.pallas_tpu.tilings import Generation, choose_geometry
from pallas_kernels.ssd.pallas_tpu import geometry as duality

DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The bundles of a loop that are not in an inner loop.

    Attributes:
        depth: 0 outside of all loops.
        bundles: how many.
        slots: filled, by unit.
    """

    depth: int
    bundles: int
    slots: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A kernel's loops in the order of the program, and the slots of a bundle by unit."""

    capacity: dict[str, int]
    loops: tuple[Loop, ...]


def read_schedule(folder: Path, kernel: str) -> Schedule:
    """A kernel's loops from the compiler's final bundles and their use of slots, which are listed in the same order."""
    listing = next(path for path in folder.iterdir() if re.search(rf"{kernel}.*-\d+-final_bundles\.txt$", path.name))
    use = next(
        path
        for path in folder.iterdir()
        if kernel in path.name and path.name.endswith("-final_hlo-static-per-bundle-utilization.txt")
    )
    _, names, capacity, _, *rows = use.read_text().splitlines()
    units = [name.strip() for name in names.split(",")]
    slots = [[*map(int, row.split())] for row in rows if row.strip()]
    bundles = re.findall(
        r"^\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:\s*((?:> ?)*)\{", listing.read_text(), re.MULTILINE
    )
    assert len(bundles) == len(slots), f"{kernel}: {len(bundles)} bundles, {len(slots)} rows of slots"
    depths = [nesting.count(">") for _, nesting in bundles]
    # The listing shows a few bundles of a loop as if they were outside; a real return would begin with a label.
    for i in range(1, len(depths)):
        back = next((k for k in range(i, min(i + 16, len(depths))) if depths[k] >= depths[i - 1]), i)
        if not bundles[back][0]:
            depths[i] = max(depths[i], min(depths[i - 1], depths[back]))
    loop_of: list[int] = []
    loops: list[int] = [0]
    stack = [0]
    for (label, _), depth in zip(bundles, depths, strict=True):
        while depth < loops[stack[-1]]:
            stack.pop()
        if label == "LB" and depth >= loops[stack[-1]] and depth > 0:
            if depth == loops[stack[-1]]:
                stack.pop()
            loops.append(depth)
            stack.append(len(loops) - 1)
        loop_of.append(stack[-1])
    return Schedule(
        capacity=dict(zip(units, map(int, capacity.split()), strict=True)),
        loops=tuple(
            Loop(
                depth=depth,
                bundles=loop_of.count(number),
                slots={
                    unit: sum(slots[i][k] for i, owner in enumerate(loop_of) if owner == number)
                    for k, unit in enumerate(units)
                },
            )
            for number, depth in enumerate(loops)
        ),
    )


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
