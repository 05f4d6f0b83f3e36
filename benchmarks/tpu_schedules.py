"""The TPU compiler's schedule of a kernel, read from the files that it dumps."""

import dataclasses
import re
from pathlib import Path


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
