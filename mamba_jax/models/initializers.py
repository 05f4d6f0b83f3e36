"""Initial values of parameters, as functions (key, shape, dtype) -> array.

They reproduce the distributions the published Mamba models started from: linear and convolution weights uniform within
+-1/sqrt(fan_in), the step size log-uniform in [dt_min, dt_max], A real and negative.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All zeros."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """All ones."""
    del key
    return jnp.ones(shape, dtype)


def normal(std: float) -> Initializer:
    """Normal with mean 0 and standard deviation `std`."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return (std * jax.random.normal(key, shape)).astype(dtype)

    return initialize


def uniform(bound: float) -> Initializer:
    """Uniform within +-`bound`."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)

    return initialize


def constant(value: float) -> Initializer:
    """Every element is `value`."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        del key
        return jnp.full(shape, value, dtype)

    return initialize


def fan_in(dim: int, *, scale: float = 1.0) -> Initializer:
    """Uniform within +-scale / sqrt(dim): Kaiming-uniform with a = sqrt(5) for a layer that sums over `dim` inputs."""
    return uniform(scale / math.sqrt(dim))


def inverse_softplus_of_step(dt_min: float, dt_max: float, floor: float) -> Initializer:
    """Bias b with softplus(b) log-uniform in [dt_min, dt_max], not below `floor`.

    Source: arXiv 2312.00752, section 3.6.
    """

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        log_dt = jax.random.uniform(key, shape, minval=math.log(dt_min), maxval=math.log(dt_max))
        dt = jnp.maximum(jnp.exp(log_dt), floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return initialize


def inverse_softplus_of_decay(low: float, high: float, *, power: float) -> Initializer:
    """Lambda with exp(-power softplus(Lambda)) uniform in [low, high], which lies between 0 and 1.

    Source: arXiv 2402.19427, section 2.4.
    """

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        rate = -jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high)) / power
        return (rate + jnp.log(-jnp.expm1(-rate))).astype(dtype)

    return initialize


def log_decay(kind: Literal["s4d_real", "constant", "random"]) -> Initializer:
    """A_log of shape (E, N), where A = -exp(A_log).

    "s4d_real" is A_n = -(n + 1), "constant" is -1/2, "random" is -exp(normal).

    Source: arXiv 2312.00752, section 3.6 and table 8.
    """

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        if kind == "s4d_real":
            a_log = jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)
        elif kind == "constant":
            a_log = jnp.full(shape, math.log(0.5))
        else:
            a_log = jax.random.normal(key, shape)
        return a_log.astype(dtype)

    return initialize


def log_of_uniform(low: float, high: float) -> Initializer:
    """A_log of any shape with -A = exp(A_log) uniform in [low, high].

    Source: the authors' Mamba-2 layer.
    """

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high)).astype(dtype)

    return initialize
