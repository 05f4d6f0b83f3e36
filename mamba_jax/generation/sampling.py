"""From logits to the next token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray

from mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; None is all.
        top_p: draw among the fewest tokens whose probabilities reach p (arXiv 1904.09751); None is all.
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


def sample(
    logits: Float[jax.Array, "B V"], key: PRNGKeyArray, sampling: SamplingConfig, *, vocab_size: int
) -> Int[jax.Array, " B"]:
    """Draws a token for every row.

    Args:
        logits: (B, V), V the padded vocabulary.
        key: a `jax.random.key`; not used at temperature 0.
        sampling: how to draw.
        vocab_size: ids from here on are padding and never drawn.

    Returns:
        Token ids, (B,) int32.
    """
    logits = logits[:, :vocab_size].astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < vocab_size:
        threshold = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if sampling.top_p is not None:
        logits = jnp.where(_in_nucleus(logits, sampling.top_p), logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _in_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Mask of the likeliest tokens before whom less than `top_p` of the probability lies; the first is always in."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.take_along_axis(mass_before < top_p, jnp.argsort(order, axis=-1), axis=-1)
