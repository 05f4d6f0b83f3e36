"""Arithmetic on registers in kernels written for a warpgroup."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from pallas_kernels.common.warpgroup import Warpgroup

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# 2 atanh(s) / s as a polynomial in s^2 for |s| up to 1/3, interpolated at Chebyshev points; relative error 4e-9.
_ATANH = (2.0000000078777482, 0.6666631593507956, 0.40024853723539416, 0.27961418833618995, 0.281746572692005)

type Registers = Sequence[jax.Array]


def loop(first, stop, body: Callable[[jax.Array, Any], Any], carry):
    """`jax.lax.fori_loop` for a carry whose lists may come back as tuples and the other way round."""
    # Kernels build lists and tuples as it suits them; the loop's types must match exactly.
    leaves, tree = jax.tree.flatten(carry)

    def advance(i, leaves):
        return jax.tree.leaves(body(i, jax.tree.unflatten(tree, leaves)))

    return jax.tree.unflatten(tree, jax.lax.fori_loop(first, stop, advance, leaves))


def added(first: Registers, second: Registers | None) -> list[jax.Array]:
    """Sums term by term; a missing second is zero."""
    return list(first) if second is None else [a + b for a, b in zip(first, second, strict=True)]


def total(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of one term or more, from left to right."""
    return functools.reduce(operator.add, terms)


def softplus(value: jax.Array, reciprocal: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """log(1 + exp(value)) to a few units in the last place, for arguments of any size.

    With e = exp(-|value|): max(value, 0) + log1p(e), and log1p(e) = 2 atanh(s) for s = e / (2 + e), at most 1/3.
    """
    # exp(-|value|) cannot overflow, whatever the sign of value.
    e = jnp.exp2(jnp.maximum(value, -value) * -LOG2_E)
    s = e * reciprocal(e + 2.0)
    square = s * s
    # Horner's scheme, from the highest power down.
    series = square * _ATANH[-1] + _ATANH[-2]
    for coefficient in _ATANH[-3::-1]:
        series = series * square + coefficient
    return jnp.maximum(value, 0.0) + s * series


def sigmoid(w: "Warpgroup", value: jax.Array) -> jax.Array:
    """1 / (1 + exp(-value))."""
    # Where the power overflows to infinity its reciprocal is 0, the right limit.
    return w.reciprocal(1.0 + jnp.exp2(value * -LOG2_E))
