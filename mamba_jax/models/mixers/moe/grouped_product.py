"""Products of rows with the matrix of their group: `jax.lax.ragged_dot`, and a form of it for CPUs.

On a CPU `ragged_dot` multiplies all rows with the matrices of all groups and masks the result, which costs as many
times more as there are groups. There the rows are walked in blocks here, and a block is multiplied with the matrices of
those groups alone that have rows in it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.common.array_types import Size
from pallas_kernels.common.partitioning import varying_like

# Rows of a block: enough of them for a matrix that is read once for each to cost less to read than to multiply.
BLOCK = 128

_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


@jax.custom_vjp
def grouped_product(
    rows: Float[jax.Array, "S I"], matrices: Float[jax.Array, "X I O"], sizes: Int[jax.Array, " X"]
) -> Float[jax.Array, "S O"]:
    """Multiplies each row with the matrix of its group: y_s = rows_s matrices_g(s).

    Args:
        rows: (S, I), those of group 0 first, then those of group 1 and so on.
        matrices: (X, I, O), of the dtype of the rows.
        sizes: rows of each group, (X,) int32. What rows beyond their sum are turned into is not said.

    Returns:
        (S, O) in the dtype of the rows.
    """
    return jax.lax.platform_dependent(rows, matrices, sizes, cpu=_by_blocks, default=jax.lax.ragged_dot)


def _forward(rows, matrices, sizes):
    return grouped_product(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(residuals, dy):
    """With the rows sorted already, each gradient is a product of groups again."""
    rows, matrices, sizes = residuals
    drows = grouped_product(dy, jnp.swapaxes(matrices, 1, 2), sizes)
    dmatrices = jax.lax.platform_dependent(rows, dy, sizes, cpu=_outer_by_blocks, default=_outer)
    return drows, dmatrices, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_product.defvjp(_forward, _backward)


def _outer(rows: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """sum_s rows_s^T dy_s for each group, (X, I, O)."""
    return jax.lax.ragged_dot_general(rows, dy, sizes, _OUTER)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Visits:
    """Pairs of a group and a block of rows in which it has some, in order: V of each.

    Attributes:
        first: first row of the block.
        group: number of the group.
        low: first row of the group.
        high: row after the group's last; not above `low` where a visit is left over.
    """

    first: jax.Array
    group: jax.Array
    low: jax.Array
    high: jax.Array

    def has(self, block: Size) -> jax.Array:
        """Of one visit: which rows of the block belong to the group, (block, 1)."""
        row = (self.first + jnp.arange(block))[:, None]
        return (row >= self.low) & (row < self.high)


def _visits(sizes_X: jax.Array, num_rows: Size, block: Size) -> _Visits:
    """All visits. There are at most as many as blocks, one more for every other group, and never more than rows."""
    num_groups = sizes_X.shape[0]
    high_X = jnp.cumsum(sizes_X)
    low_X = high_X - sizes_X
    first_X = low_X // block
    count_X = jnp.where(sizes_X > 0, (high_X - 1) // block - first_X + 1, 0)
    after_X = jnp.cumsum(count_X)
    visit = jnp.arange(jax.core.min_dim(num_rows // block + num_groups - 1, num_rows), dtype=sizes_X.dtype)
    # Visits that are left over belong to the last group, whose rows they do not reach.
    group = jnp.minimum(jnp.sum(visit[:, None] >= after_X[None], axis=1), num_groups - 1)
    is_needed = visit < after_X[-1]
    place = first_X[group] + visit - (after_X - count_X)[group]
    return _Visits(
        first=jnp.where(is_needed, place, 0) * block,
        group=group,
        low=low_X[group],
        high=jnp.where(is_needed, high_X[group], 0),
    )


def _in_blocks(rows: jax.Array) -> tuple[jax.Array, Size]:
    """The rows, with zeros after them up to whole blocks, and the rows of a block."""
    block = jax.core.min_dim(BLOCK, rows.shape[0])
    return jnp.pad(rows, ((0, -rows.shape[0] % block), (0, 0))), block


def _by_blocks(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_product`, a visit after the other; rows of no group become zeros."""
    padded, block = _in_blocks(rows)

    def visit(y: jax.Array, at: _Visits) -> tuple[jax.Array, None]:
        product = jax.lax.dynamic_slice_in_dim(padded, at.first, block) @ matrices[at.group]
        before = jax.lax.dynamic_slice_in_dim(y, at.first, block)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(at.has(block), product, before), at.first, 0), None

    start = varying_like(rows, {"y": jnp.zeros((padded.shape[0], matrices.shape[2]), rows.dtype)})
    y, _ = jax.lax.scan(visit, start["y"], _visits(sizes, padded.shape[0], block))
    return y[: rows.shape[0]]


def _outer_by_blocks(rows: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """`_outer`, a visit after the other; sums are float32."""
    (padded, block), (dpadded, _) = _in_blocks(rows), _in_blocks(dy)

    def visit(total: jax.Array, at: _Visits) -> tuple[jax.Array, None]:
        x = jnp.where(at.has(block), jax.lax.dynamic_slice_in_dim(padded, at.first, block), 0)
        dx = jax.lax.dynamic_slice_in_dim(dpadded, at.first, block)
        return total.at[at.group].add(jnp.matmul(x.T, dx, preferred_element_type=jnp.float32)), None

    start = varying_like(rows, {"total": jnp.zeros((sizes.shape[0], rows.shape[1], dy.shape[1]), jnp.float32)})
    total, _ = jax.lax.scan(visit, start["total"], _visits(sizes, padded.shape[0], block))
    return total.astype(rows.dtype)
