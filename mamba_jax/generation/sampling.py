"""Draws the next token from logits: temperature, top-k and top-p sampling."""

import dataclasses
import math
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from mamba_jax.errors import InputError

# Temperatures are limited to this range. Outside of it, the temperature or its inverse is not a normal float32 number,
# and dividing logits of 0 or -inf by it would give NaN.
_LOWEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)
_HIGHEST_TEMPERATURE = 1 / _LOWEST_TEMPERATURE
# The value of `top_k` that stands for all tokens, larger than any vocabulary.
_ALL = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: number that the logits are divided by; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; None, or more than there are, means all.
        top_p: draw among the fewest likeliest tokens whose probabilities add up to at least p (arXiv 1904.09751); None
            or 1 means all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"sampling temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"sampling top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"sampling top_p must lie in (0, 1], got {self.top_p}")


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """`SamplingConfig` as arrays with one value per row, so that one compiled program serves all settings.

    Attributes:
        temperature: (B,) float32; 0 takes the likeliest token.
        top_k: (B,) int32; V or more is all tokens.
        top_p: (B,) float32; 1 is all tokens.
    """

    temperature: Float[jax.Array | np.ndarray, " B"]
    top_k: Int[jax.Array | np.ndarray, " B"]
    top_p: Float[jax.Array | np.ndarray, " B"]

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig]) -> "Sampling":
        """The arrays for the given configs, one config per row."""
        temperatures = [
            min(max(config.temperature, _LOWEST_TEMPERATURE), _HIGHEST_TEMPERATURE) if config.temperature else 0.0
            for config in configs
        ]
        top_k = [min(config.top_k or _ALL, _ALL) for config in configs]
        return cls(
            temperature=np.asarray(temperatures, np.float32),
            top_k=np.asarray(top_k, np.int32),
            top_p=np.asarray([config.top_p or 1.0 for config in configs], np.float32),
        )


def sample(
    logits: Float[jax.Array, "B V"],
    key: PRNGKeyArray,
    sampling: SamplingConfig | Sampling,
    *,
    vocab_size: int,
    allowed: Bool[jax.Array | np.ndarray, " vocab_size"] | None = None,
) -> Int[jax.Array, " B"]:
    """Draws a token for every row.

    If logits are equal, those of lower ids count as likelier.

    Args:
        logits: (B, V), V the padded vocabulary; ids with -inf are never drawn.
        key: a `jax.random.key`; not used at temperature 0.
        sampling: how to draw: one config for all rows, or arrays with a setting per row.
        vocab_size: ids from here on are padding and never drawn.
        allowed: (vocab_size,), whether each id may be drawn; None allows all.

    Returns:
        Token ids, (B,) int32; -1 for rows where no token can be drawn: a logit is NaN or +inf, or all are -inf.
    """
    if isinstance(sampling, SamplingConfig):
        sampling = Sampling.of([sampling] * logits.shape[0])
    logits = logits[:, :vocab_size].astype(jnp.float32)
    if allowed is not None:
        logits = jnp.where(allowed[None], logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    tokens = _draw(logits - peak, key, sampling)
    return jnp.where(jnp.isfinite(peak[:, 0]), tokens, -1).astype(jnp.int32)


def _draw(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws tokens (B,) from logits (B, vocab_size) that have been shifted so that the highest of each row is 0."""
    temperature = jnp.asarray(sampling.temperature)
    likeliest = jnp.argmax(logits, axis=-1)
    # If every row takes the likeliest token, no random numbers (one per id) need to be made.
    drawn = jax.lax.cond(jnp.any(temperature > 0), lambda: _draw_randomly(logits, key, sampling), lambda: likeliest)
    return jnp.where(temperature == 0, likeliest, drawn)


def _draw_randomly(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    temperature = jnp.asarray(sampling.temperature)[:, None]
    logits = logits / jnp.where(temperature == 0, 1, temperature)
    is_cut = jnp.any((sampling.top_k < logits.shape[-1]) | (sampling.top_p < 1))
    # Sorting the vocabulary takes longer than all else, and most settings do not need it.
    logits = jax.lax.cond(is_cut, _cut, lambda logits, sampling: logits, logits, sampling)
    return jax.random.categorical(key, logits, axis=-1)


def _cut(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the logits of all tokens that `top_k` and `top_p` exclude to -inf; (B, vocab_size) in and out."""
    top_k, top_p = jnp.asarray(sampling.top_k)[:, None], jnp.asarray(sampling.top_p)[:, None]
    # Sorted by position, so exactly k remain even if several are equal; `top_k` puts the lower of equal ids first.
    likeliest, ids = jax.lax.top_k(logits, logits.shape[-1])
    likeliest = jnp.where(jnp.arange(logits.shape[-1])[None] < top_k, likeliest, -jnp.inf)
    likeliest = jnp.where((top_p < 1) & (_mass_before(likeliest) >= top_p), -jnp.inf, likeliest)
    # Back in the order of ids: each id gets the same random number even if rounding changes the order of two logits.
    return jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), ids, likeliest, axis=-1, inplace=False)


def _mass_before(logits: jax.Array) -> jax.Array:
    """For logits in descending order, the total probability of the tokens in front of each one; 0 for the first."""
    mass = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    return jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
