"""What is declared of an op besides its arguments: the calls it is tested and timed with, its accuracy and its work.

A call draws concrete arrays from a seed. Counts are sums of products of sizes, in the letters of
`pallas_kernels.common.array_types`: {"BLEN": 6, "E": 1} is 6 B L E N + E.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

DType = Literal["float32", "bfloat16"]
Count = Mapping[str, int]
Platform = Literal["cpu", "accelerator"]

# A float32 operation is off by half an epsilon of its result at most.
FLOAT32_ROUNDING = float(np.finfo(np.float32).eps) / 2
# A result in bfloat16 is the float32 result rounded once, to 8 significant bits.
BFLOAT16_ROUNDING = float(jnp.finfo(jnp.bfloat16).eps) / 2
# For partial sums that exceed the result (terms of both signs), and for exp, softplus and silu, which are good to a few
# units in the last place.
ALLOWANCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """A call of an op, in double precision, to be rounded to the dtypes under test.

    Attributes:
        wide: arguments that stay float32 (complex64) whatever the dtype of the sequence.
        narrow: arguments in the dtype of the sequence.
        integers: arguments without a gradient.
        static: options.
    """

    wide: dict[str, np.ndarray]
    narrow: dict[str, np.ndarray]
    integers: dict[str, np.ndarray]
    static: Mapping[str, object]

    def rounded(self, dtype: DType) -> dict[str, np.ndarray]:
        """The arguments with a gradient, the narrow ones in `dtype`.

        Rounded by NumPy, which compiles nothing, and by way of float32 as an array of JAX would be.
        """
        single = {name: _to_single(array) for name, array in (self.wide | self.narrow).items()}
        return single | {name: single[name].astype(jnp.dtype(dtype)) for name in self.narrow}


def _to_single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex64 if np.iscomplexobj(array) else np.float32)


def segment_ids(rng: np.random.Generator, *, batch: int, length: int) -> np.ndarray:
    """Documents of random lengths, about 12 tokens each, with starts on and beside multiples of 16.

    Ids rise and fall, so that a later document has the id of an earlier one.
    """
    is_start = rng.random((batch, length)) < 1 / 12
    fixed = [position for position in (1, 2, 16, 31, 32, 64) if position < length]
    is_start[0, fixed] = True
    return (np.cumsum(is_start, axis=1) % 3).astype(np.int32)


@runtime_checkable
class CallSpec(Protocol):
    """Sizes and options of one call: a frozen dataclass whose `name` says what the call is of."""

    @property
    def name(self) -> str:
        """What messages and results call it."""
        ...

    @property
    def dtype(self) -> DType:
        """Of the sequences."""
        ...

    def arguments(self, seed: int = 0) -> Arguments:
        """Draws the arguments."""
        ...


def evaluate(count: Count, sizes: Mapping[str, int]) -> int:
    """The value of a count at given sizes."""
    return sum(times * math.prod(sizes[letter] for letter in letters) for letters, times in count.items())


def written(count: Count) -> str:
    """A count as text, such as "6 B L E N + E"."""
    terms = [" ".join(([] if times == 1 else [str(times)]) + list(letters)) for letters, times in count.items()]
    return " + ".join(terms) or "0"


def allowed_error(exact: np.ndarray, dtype: Any, *, terms: int) -> np.ndarray:
    """Largest error that an array may have, element by element.

        8 (eps / 2) sqrt(n) max |exact|,    eps = 2^-23,

    and for an array in bfloat16 half an epsilon of bfloat16, 2^-8, of the element besides: one rounding. Sums run in
    float32, and a sum of n terms makes n roundings, each at most eps / 2 of the partial sum at hand. They are as good
    as independent, so they add up to sqrt(n) of them. `ALLOWANCE` explains the factor.

    Args:
        exact: the array in double precision.
        dtype: that of the array that is compared with it.
        terms: n, of the longest sum.
    """
    allowed = np.full(exact.shape, ALLOWANCE * FLOAT32_ROUNDING * math.sqrt(terms) * np.max(np.abs(exact), initial=0))
    return allowed + BFLOAT16_ROUNDING * np.abs(exact) if dtype == jnp.bfloat16 else allowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an implementation may be off: `allowed_error`, with the terms of the longest sum of the op.

    Attributes:
        longest_sum: number of its terms.
        because: which results are these sums.
    """

    longest_sum: Count
    because: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of a pass, by the unit of a chip that does them.

    Only what the equations ask for is counted, each quantity once: a backward pass finds those of the forward pass.

    Attributes:
        vector: additions, multiplications, comparisons; a fused multiply-add is two.
        special: exponentials, logarithms, reciprocals.
        matrix: additions and multiplications of matrix products.
    """

    vector: Count
    special: Count = dataclasses.field(default_factory=dict)
    matrix: Count = dataclasses.field(default_factory=dict)


def without_length(work: Work) -> Work:
    """The work of one token."""
    counts = {
        unit: {letters.replace("L", ""): times for letters, times in count.items()}
        for unit, count in vars(work).items()
    }
    return Work(**counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is declared of an op.

    Attributes:
        sizes: the fields of a call that are its sizes, in the order in which "8x2048x1536x16" gives them.
        tested: calls that every implementation is held to the contract with.
        timed: calls that benchmarks time, by what they suit. Their names differ.
        tolerance: of the contract.
        forward: operations of the op.
        backward: operations of all its gradients.
    """

    sizes: tuple[str, ...]
    tested: tuple[CallSpec, ...]
    timed: Mapping[Platform, tuple[CallSpec, ...]] = dataclasses.field(default_factory=dict)
    tolerance: Tolerance
    forward: Work
    backward: Work

    def workload(self, name: str) -> CallSpec:
        """The call of this name that benchmarks time.

        Raises:
            ValueError: there is none.
        """
        known = {spec.name: spec for specs in self.timed.values() for spec in specs}
        if name not in known:
            raise ValueError(f"unknown workload {name!r}; there are {', '.join(sorted(known)) or 'none'}")
        return known[name]

    def workload_of(self, text: str) -> CallSpec:
        """The call of sizes such as "8x2048x1536x16", with the options of the first call that is timed, or tested.

        Raises:
            ValueError: it is not positive integers, as many as the op has sizes.
        """
        numbers = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
        first: Any = next((spec for specs in self.timed.values() for spec in specs), self.tested[0])
        if len(numbers) != len(self.sizes) or 0 in numbers:
            raise ValueError(
                f"{text!r} is not a shape of this op: expected {' x '.join(self.sizes)}, for example "
                f"{self.shape_text(first)}"
            )
        return dataclasses.replace(first, name="", **dict(zip(self.sizes, numbers, strict=True)))

    def shape_text(self, spec: CallSpec) -> str:
        """The sizes of a call as text, such as "8x2048x1536x16"."""
        return "x".join(str(getattr(spec, name)) for name in self.sizes)


def tolerance_table(manifests: Mapping[str, Manifest]) -> str:
    """Lines of a table: the longest sum of every op and where it comes from."""
    rows = (f"| `{op}` | {written(m.tolerance.longest_sum)} | {m.tolerance.because} |" for op, m in manifests.items())
    return "\n".join(["| op | terms of the longest sum, n | because |", "|---|---|---|", *rows])


def work_table(manifests: Mapping[str, Manifest]) -> str:
    """Lines of a table: the operations of every op and pass, by unit."""
    rows = (
        f"| `{op}` | {direction} | {written(work.vector)} | {written(work.special)} | {written(work.matrix)} |"
        for op, manifest in manifests.items()
        for direction, work in (("forward", manifest.forward), ("backward", manifest.backward))
    )
    return "\n".join(["| op | pass | vector | special | matrix |", "|---|---|---|---|---|", *rows])
