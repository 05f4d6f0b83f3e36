"""Penalties on tokens that came before, and what has to be remembered for them."""

import dataclasses
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int


# Not checked at construction: JAX also builds these classes around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalties:
    """The penalties of `SamplingConfig` as arrays with one value per row.

    Attributes:
        repetition: (B,) float32; 1 is none.
        presence: (B,) float32; 0 is none.
        frequency: (B,) float32; 0 is none.
    """

    repetition: Float[jax.Array | np.ndarray, " B"]
    presence: Float[jax.Array | np.ndarray, " B"]
    frequency: Float[jax.Array | np.ndarray, " B"]


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """Which tokens each row holds so far. Only penalties need it.

    Attributes:
        counts: how often each id was generated, (B, V) int32, V the vocabulary without padding.
        in_prompt: whether each id occurs in the prompt, (B, V).
    """

    counts: Int[jax.Array, "B V"]
    in_prompt: Bool[jax.Array, "B V"]

    @classmethod
    def of(
        cls,
        prompts: Int[jax.Array | np.ndarray, "B L"],
        lengths: Int[jax.Array | np.ndarray, " B"] | None = None,
        *,
        vocab_size: int,
    ) -> "History":
        """The history of rows that have read their prompts and generated nothing.

        Args:
            prompts: token ids, (B, L); those behind a row's length do not count.
            lengths: number of tokens in each prompt, (B,); None means L for all.
            vocab_size: V.
        """
        batch, length = prompts.shape
        tokens = jnp.asarray(prompts)
        if lengths is not None:
            tokens = jnp.where(jnp.arange(length)[None] < jnp.asarray(lengths)[:, None], tokens, -1)
        nothing = jnp.zeros((batch, vocab_size), bool)
        in_prompt = nothing.at[jnp.arange(batch)[:, None], _or_outside(tokens, vocab_size)].set(True, mode="drop")
        return cls(counts=jnp.zeros((batch, vocab_size), jnp.int32), in_prompt=in_prompt)

    @classmethod
    def of_prompts(cls, prompts: Sequence[Sequence[int]], *, vocab_size: int) -> "History":
        """The same for prompts of any lengths, empty ones too, made on the host."""
        in_prompt = np.zeros((len(prompts), vocab_size), bool)
        for row, prompt in enumerate(prompts):
            in_prompt[row, list(prompt)] = True
        return cls(counts=jnp.zeros(in_prompt.shape, jnp.int32), in_prompt=jnp.asarray(in_prompt))

    def added(self, tokens: Int[jax.Array, " B"]) -> "History":
        """The history after one more generated token of each row, (B,); -1, for no token, counts nowhere."""
        batch, vocab_size = self.counts.shape
        at = self.counts.at[jnp.arange(batch), _or_outside(tokens, vocab_size)]
        return dataclasses.replace(self, counts=at.add(1, mode="drop"))


def penalised(logits: Float[jax.Array, "B V"], penalties: Penalties, history: History) -> Float[jax.Array, "B V"]:
    """The logits of a model after its penalties.

    With c the count of a token in the continuation, r, p and f the row's penalties: a logit l of a token that occurs in
    prompt or continuation becomes l / r if it is positive and l * r if not; then p [c > 0] + f c is subtracted.

    Args:
        logits: (B, V) float32, as the model gives them.
        penalties: one value per row.
        history: the tokens of each row so far.

    Source: arXiv 1909.05858, section 4.1, with the usual other case for negative logits; OpenAI's API for the last two.
    """
    repetition = jnp.asarray(penalties.repetition)[:, None]
    occurs = history.in_prompt | (history.counts > 0)
    logits = jnp.where(occurs, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    presence, frequency = jnp.asarray(penalties.presence)[:, None], jnp.asarray(penalties.frequency)[:, None]
    return logits - presence * (history.counts > 0) - frequency * history.counts


def _or_outside(tokens: jax.Array, vocab_size: int) -> jax.Array:
    """The ids; negative ones, which would count from the end, are put behind the vocabulary, where they are dropped."""
    return jnp.where(tokens < 0, vocab_size, tokens)
