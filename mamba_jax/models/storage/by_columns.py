"""Matrices whose columns each lie in one piece of memory, which is how kernels read them that multiply a few rows.

Only the place of elements in memory changes: shapes and values are the same, and so is what any program computes.
"""

import dataclasses
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from mamba_jax.models.storage.matrix import Quantized
from mamba_jax.models.storage.per_layer import PerLayer


def by_columns(tree: Any, summed: Any) -> Any:
    """The tree of a stack with an array for each layer, whose matrices lie by columns.

    Args:
        tree: of `PerLayer`, whose arrays may be shapes: then these say how arrays will lie. Arrays that are traced or
            split over devices, and other leaves, stay as they are.
        summed: the same tree, the dimension that products sum over in the stacked array; None where there is none.
    """

    def moved(dim: int | None, leaf: Any) -> Any:
        if dim is not None and isinstance(leaf, Quantized):
            matrix: Any = leaf
            return dataclasses.replace(matrix, qvalue=moved(dim, matrix.qvalue))
        if dim is None or not isinstance(leaf, PerLayer):
            return leaf
        return PerLayer(tuple(_moved(array, dim - 1) for array in leaf.arrays))

    return jax.tree.map(moved, summed, tree, is_leaf=lambda leaf: leaf is None)


def _moved(array: Any, dim: int) -> Any:
    """An array, or its shape, with a dimension last in memory."""
    if isinstance(array, jax.core.Tracer) or array.sharding is None or len(array.sharding.device_set) > 1:
        return array
    others = [other for other in range(array.ndim) if other != dim]
    wanted = Format(Layout((*others, dim)), array.sharding)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=wanted)
    return jax.device_put(array, wanted)
