"""A checksum for each array that is computed on the devices and does not depend on how the array is split over them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprints(tree: Any) -> dict[str, int]:
    r"""Fingerprints of all arrays of a tree.

        fingerprint = sum_i mix(bits_i xor mix(i))  modulo 2^32

    where i numbers the elements and mix is a bijection of 32-bit words. One changed element always changes the sum;
    changes of several elements cancel with a probability of about 2^-32. Integer sums do not depend on their order, so
    the fingerprint is the same on every mesh and for any number of processes.

    Args:
        tree: arrays of any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        Fingerprints in [0, 2^32) by the path of their array, such as "params/norm_f/scale".
    """
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
    values = jax.device_get(_fingerprints(jax.tree.leaves(tree)))
    return {name: int(value) for name, value in zip(names, values, strict=True)}


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    return [fingerprint(leaf) for leaf in leaves]


def fingerprint(leaf: jax.Array) -> jax.Array:
    """The fingerprint of one array, a uint32 scalar; words of 8-byte elements count as elements of their own.

    To be called inside a jitted function.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, np.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * np.uint32(stride % 2**32)
        stride *= words.shape[dim]
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: each line is a bijection."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
