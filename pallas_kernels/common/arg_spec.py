"""What the argument specifications of all ops share: concrete arrays of a given seed, for tests and benchmarks."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np

DType = Literal["float32", "bfloat16"]


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
