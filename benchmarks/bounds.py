"""How fast chips could do an op's work at best: rates of their units, and the time of the one that needs most."""

import dataclasses
from collections.abc import Mapping, Sequence

from mamba_jax.models.flops import PEAK_FLOPS
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


def _gpu(kind: str, processors: Multiprocessors, memory: float) -> Chip:
    cycles = processors.number * processors.clock_hz
    return Chip(
        memory=memory,
        vector=2 * processors.lanes * cycles,
        special=SPECIAL_A_CYCLE * cycles,
        matrix=PEAK_FLOPS[kind],
    )


def _tpu(kind: str, memory: float) -> Chip:
    return Chip(memory=memory, vector=None, special=None, matrix=PEAK_FLOPS[kind])


# By the device kind that JAX reports. Google's Cloud TPU documentation has the memory of TPUs.
CHIPS = {
    "NVIDIA A100-SXM4-40GB": _gpu("NVIDIA A100-SXM4-40GB", A100, 1555e9),
    "NVIDIA A100-SXM4-80GB": _gpu("NVIDIA A100-SXM4-80GB", A100, 2039e9),
    "NVIDIA H100 80GB HBM3": _gpu("NVIDIA H100 80GB HBM3", H100, 3352e9),
    "NVIDIA H200": _gpu("NVIDIA H200", H100, 4800e9),
    "TPU v4": _tpu("TPU v4", 1228e9),
    "TPU v5 lite": _tpu("TPU v5 lite", 819e9),
    "TPU v5": _tpu("TPU v5", 2765e9),
}


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
