"""How fast chips could do an op's work at best: rates of their units, and the time of the one that needs most."""

import dataclasses
from collections.abc import Mapping, Sequence

from mamba_jax.chips import CHIPS
from pallas_kernels.common.arg_spec import Work, evaluate

# Of an NVIDIA multiprocessor and cycle: "Arithmetic Instructions" in the CUDA C++ Programming Guide, compute
# capabilities 8.0 and 9.0. A lane's fused multiply-add is two operations.
SPECIAL_A_CYCLE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device does in a second at most; None is not published.

    Attributes:
        memory: bytes.
        vector: float32 operations.
        special: exponentials, logarithms, reciprocals.
        matrix: bfloat16 operations within matrix products.
    """

    memory: float
    vector: float | None
    special: float | None
    matrix: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time of a program on a chip, and what takes it.

    Attributes:
        milliseconds: of the unit that needs most.
        unit: "memory", "vector", "special" or "matrix".
    """

    milliseconds: float
    unit: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiprocessors:
    """Those of an NVIDIA GPU.

    Attributes:
        number: of them.
        clock_hz: boost clock.
        lanes: that do a float32 multiply-add a cycle, of each.
    """

    number: int
    clock_hz: float
    lanes: int


# Data sheets of the A100 (40 and 80 GB, SXM), H100 SXM and H200 SXM.
A100 = Multiprocessors(number=108, clock_hz=1.41e9, lanes=64)
H100 = Multiprocessors(number=132, clock_hz=1.98e9, lanes=128)


MULTIPROCESSORS = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H100,
}


def chip(kind: str) -> Chip | None:
    """The rates of a device kind; None where that of its memory is not known."""
    figures = CHIPS.get(kind)
    if figures is None or figures.memory_bytes_per_second is None:
        return None
    processors = MULTIPROCESSORS.get(kind)
    cycles = None if processors is None else processors.number * processors.clock_hz
    return Chip(
        memory=figures.memory_bytes_per_second,
        vector=None if processors is None or cycles is None else 2 * processors.lanes * cycles,
        special=None if cycles is None else SPECIAL_A_CYCLE * cycles,
        matrix=figures.peak_flops,
    )


def bound(chip: Chip, *, moved: float, passes: Sequence[Work], sizes: Mapping[str, int]) -> Bound:
    """The least time of a program.

    Args:
        chip: that it runs on.
        moved: bytes that cross the memory.
        passes: of the op that it consists of.
        sizes: of the call, by letter.
    """
    seconds = {"memory": moved / chip.memory}
    for unit in ("vector", "special", "matrix"):
        rate = getattr(chip, unit)
        if rate is not None:
            seconds[unit] = sum(evaluate(getattr(work, unit), sizes) for work in passes) / rate
    unit = max(seconds, key=lambda name: seconds[name])
    return Bound(milliseconds=1e3 * seconds[unit], unit=unit)
