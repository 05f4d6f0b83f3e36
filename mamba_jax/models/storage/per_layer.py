"""Arrays of a stack of blocks as one array a layer.

A training step scans over stacked arrays, so that its program does not grow with depth. A program that reads one token
would copy each layer's weights and state out of the stack, which takes as long as reading them does. It runs the
blocks one after the other instead, each on arrays of its own, and writes their states in place.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp


# Not checked at construction: JAX also builds this class around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """An array of a stack, in parts; stands in trees where the stacked array would.

    Attributes:
        arrays: of each layer, the first layer first.
    """

    arrays: tuple[jax.Array, ...]


def _is_per_layer(leaf: Any) -> bool:
    return isinstance(leaf, PerLayer)


def is_unstacked(tree: Any) -> bool:
    """Whether the arrays of a stack, of which the tree has any, are per layer."""
    return any(map(_is_per_layer, jax.tree.leaves(tree, is_leaf=_is_per_layer)))


def num_layers(tree: Any) -> int:
    """How many layers the arrays are of, of a tree that `is_unstacked`."""
    return next(len(leaf.arrays) for leaf in jax.tree.leaves(tree, is_leaf=_is_per_layer))


def unstacked(tree: Any) -> Any:
    """The tree of a stack, (R, ...) for R layers in every array, with an array for each layer."""

    def parts(array: Any) -> Any:
        if _is_per_layer(array):
            return array
        # Unlike those of iterating, these parts stay on the devices that the array is split over.
        return PerLayer(tuple(jax.lax.index_in_dim(array, index, keepdims=False) for index in range(array.shape[0])))

    return jax.tree.map(parts, tree, is_leaf=_is_per_layer)


def stacked(tree: Any) -> Any:
    """Reverses `unstacked`."""

    def whole(array: Any) -> Any:
        return jnp.stack(array.arrays) if _is_per_layer(array) else array

    return jax.tree.map(whole, tree, is_leaf=_is_per_layer)


def layer(tree: Any, index: int) -> Any:
    """The arrays of one layer, of a tree with an array for each."""
    return jax.tree.map(lambda parts: parts.arrays[index], tree, is_leaf=_is_per_layer)


def of_layers(trees: list[Any]) -> Any:
    """Reverses `layer`: the tree of a stack, from those of its layers."""
    return jax.tree.map(lambda *arrays: PerLayer(arrays), *trees)
