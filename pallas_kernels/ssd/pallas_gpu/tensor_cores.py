"""Products of matrices on the tensor cores of an NVIDIA GPU, and what they mean in terms of whole arrays.

A warpgroup's product reads its right operand, and may read its left one, from shared memory. `multiply` and
`accumulate` compile to that; interpreted they are products of arrays, so that the same kernel runs on a CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# How a warpgroup's registers hold a matrix for its products, and a value for each row or column of it.
MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class _Accumulator:
    """An accumulator of the interpreter."""

    def __init__(self, value: jax.Array):
        self.value = value


def tile(*shape: int) -> Any:
    """Shared memory for bfloat16 matrices in the arrangement that products read; the last two axes are the matrix."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def multiply(accumulator: Any, a: Any, b: Any, *, transposed: str = "") -> None:
    """Starts accumulator += a b, with those of "ab" transposed that `transposed` names; b is shared memory."""
    if isinstance(accumulator, _Accumulator):
        left, right = (matrix[...].T if name in transposed else matrix[...] for name, matrix in (("a", a), ("b", b)))
        accumulator.value = accumulator.value + jnp.dot(left, right, preferred_element_type=jnp.float32)
        return
    a, b = (matrix.transpose((1, 0)) if name in transposed else matrix for name, matrix in (("a", a), ("b", b)))
    plgpu.wgmma(accumulator, a, b)


def accumulate(body: Callable[..., None], starts: tuple[jax.Array, ...], *, interpreted: bool) -> tuple[jax.Array, ...]:
    """Runs a body that starts products into accumulators with these first values; returns them when all have ended."""
    if interpreted:
        accumulators = [_Accumulator(start) for start in starts]
        body(*accumulators)
        return tuple(accumulator.value for accumulator in accumulators)
    results: Any = pl.run_state(lambda refs: body(*refs))(tuple(plgpu.ACC.init(start) for start in starts))
    return results


def from_zero(body: Callable[..., Any], shapes: tuple[tuple[int, int], ...], *, interpreted: bool) -> Any:
    """Runs a body that starts products into accumulators of these shapes, which are zero first; returns its result."""
    if interpreted:
        return body(*(_Accumulator(jnp.zeros(shape, jnp.float32)) for shape in shapes))
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def read(accumulator: Any, *, running: int = 0) -> jax.Array:
    """The value of an accumulator when only so many of the last products that were started may be running."""
    if isinstance(accumulator, _Accumulator):
        return accumulator.value
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=running)


def zeros(rows: int, columns: int) -> jax.Array:
    """A matrix of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), MATRIX)


def by_row(values: jax.Array, columns: int) -> jax.Array:
    """A value for each row, repeated along the columns."""
    return jax.lax.broadcast_in_dim(values, (values.shape[0], columns), (0,))


def by_column(values: jax.Array, rows: int) -> jax.Array:
    """A value for each column, repeated along the rows."""
    return jax.lax.broadcast_in_dim(values, (rows, values.shape[0]), (1,))


def row_sums(matrix: jax.Array) -> jax.Array:
    """The sum of each row."""
    return jnp.sum(matrix, axis=1)
