"""From logits to the next token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from mamba_jax.errors import InputError

# Beyond these float32 has no normal number for the temperature or its inverse, and 0 or -inf would become NaN.
_LOWEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)
_HIGHEST_TEMPERATURE = 1 / _LOWEST_TEMPERATURE


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; None is all, and so is more than there are.
        top_p: draw among the fewest tokens whose probabilities reach p (arXiv 1904.09751); None is all, and so is 1.
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
    logits: Float[jax.Array, "B V"],
    key: PRNGKeyArray,
    sampling: SamplingConfig,
    *,
    vocab_size: int,
    allowed: Bool[jax.Array, " vocab_size"] | None = None,
) -> Int[jax.Array, " B"]:
    """Draws a token for every row.

    Among equal logits the lowest ids count as the likeliest.

    Args:
        logits: (B, V), V the padded vocabulary; -inf is never drawn.
        key: a `jax.random.key`; not used at temperature 0.
        sampling: how to draw.
        vocab_size: ids from here on are padding and never drawn.
        allowed: (vocab_size,), whether an id may be drawn; None allows all.

    Returns:
        Token ids, (B,) int32; -1 where there is none to draw: a logit is NaN or +inf, or all are -inf.
    """
    logits = logits[:, :vocab_size].astype(jnp.float32)
    if allowed is not None:
        logits = jnp.where(allowed[None], logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    tokens = _draw(logits - peak, key, sampling)
    return jnp.where(jnp.isfinite(peak[:, 0]), tokens, -1).astype(jnp.int32)


def _draw(logits: jax.Array, key: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Tokens by logits whose highest is 0."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / min(max(sampling.temperature, _LOWEST_TEMPERATURE), _HIGHEST_TEMPERATURE)
    vocab_size = logits.shape[-1]
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    top_p = sampling.top_p or 1.0
    if top_k < vocab_size or top_p < 1:
        # Stable, hence exactly k of them however many are equal, the lowest ids first.
        likeliest, ids = jax.lax.top_k(logits, top_k)
        if top_p < 1:
            likeliest = jnp.where(_mass_before(likeliest) < top_p, likeliest, -jnp.inf)
        # Back in the order of ids, each keeps its noise if rounding swaps two of the likeliest.
        logits = jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), ids, likeliest, axis=-1, inplace=False)
    return jax.random.categorical(key, logits, axis=-1)


def _mass_before(logits: jax.Array) -> jax.Array:
    """Probability that lies in front of each token of a falling order; 0 for the first."""
    mass = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    return jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
