"""The head of a language model: from the last hidden state to the logits of the next token."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mamba_jax.models.storage.matrix import Matrix


# Not checked at construction: JAX also builds this class around shapes, shardings and cotangents.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A linear head: logits = hidden matrix^T, and then c tanh(logits / c) if they are capped (arXiv 2408.00118).

    Attributes:
        matrix: (V, D), V the padded vocabulary, in the parameter dtype or in int8.
        logit_cap: c; None leaves logits as they are.
    """

    matrix: Matrix
    logit_cap: float | None = dataclasses.field(default=None, metadata={"static": True})


def capped(logits: Float[jax.Array, "... V"], cap: float | None) -> Float[jax.Array, "... V"]:
    """Logits within +-`cap`."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def capped_slope(capped_logits: Float[jax.Array, "... V"], cap: float) -> Float[jax.Array, "... V"]:
    """The derivative of `capped`, 1 - (capped / cap)^2, from its value."""
    return 1 - jnp.square(capped_logits / cap)
