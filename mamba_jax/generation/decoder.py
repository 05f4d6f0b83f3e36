"""A model that writes: a prompt at once, then token after token, under settings that are arrays."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from mamba_jax.errors import InputError
from mamba_jax.generation.sampling import Sampling, sample
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import LMState


# Not checked at construction: JAX also builds these classes around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Result of reading prompts.

    Attributes:
        logits: of the token after each prompt, (B, V) in float32, V the padded vocabulary.
        state: after the last token of each prompt.
    """

    logits: Float[jax.Array, "B V"]
    state: LMState


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """Result of one step.

    Attributes:
        tokens: drawn for each row, (B,); -1 where the logits left none to draw.
        logits: that they were drawn from, (B, V) in float32.
        state: after the tokens that the step was given.
    """

    tokens: Int[jax.Array, " B"]
    logits: Float[jax.Array, "B V"]
    state: LMState


class Decoder:
    """Reads prompts and writes tokens; what loops, servers and `generate` are built on.

    Each method is one compiled program a batch shape: settings, lengths and keys are arrays, so none of them compiles
    anew. A token takes the same time and memory however many came before.

    Example:
        decoder = Decoder(definition, params)
        sampling = Sampling.of([SamplingConfig(temperature=0.7), SamplingConfig(top_k=40)])
        read = decoder.prefill(prompts, lengths)
        token = decoder.draw(read.logits, sampling, key)
        while not done(token):
            key = jax.random.fold_in(key, 1)
            step = decoder.step(state, token, sampling, key)
            token, state = step.tokens, step.state

    Args:
        definition: the model to run.
        params: its parameters.
    """

    def __init__(self, definition: ModelDefinition, params: Params) -> None:
        self.definition, self.params = definition, params

    def prefill(
        self, tokens: Int[jax.Array | np.ndarray, "B L"], lengths: Int[jax.Array | np.ndarray, " B"] | None = None
    ) -> Prefilled:
        """Reads prompts, each as if it were alone.

        Args:
            tokens: ids, (B, L); what follows a row's length may be any ids and changes nothing.
            lengths: tokens of each prompt, (B,), from 1 to L; None is L.

        Raises:
            InputError: there is no token, or a length is outside of 1 .. L.
        """
        if tokens.shape[1] == 0:
            raise InputError("the prompt has no tokens: give at least one")
        if lengths is not None:
            check_lengths(np.asarray(lengths), tokens.shape[1])
        return _prefill(self.definition, self.params, tokens, lengths)

    def draw(self, logits: Float[jax.Array, "B V"], sampling: Sampling, key: PRNGKeyArray) -> Int[jax.Array, " B"]:
        """A token for every row; see `sample`."""
        return _draw(self.definition, logits, sampling, key)

    def step(
        self, state: LMState, tokens: Int[jax.Array | np.ndarray, " B"], sampling: Sampling, key: PRNGKeyArray
    ) -> Decoded:
        """Reads one more token of each row and draws the next.

        Args:
            state: after all tokens before.
            tokens: ids, (B,).
            sampling: how to draw, one setting a row.
            key: a `jax.random.key`, another one for every step.
        """
        return _step(self.definition, self.params, state, tokens, sampling, key)


def check_lengths(lengths: Int[np.ndarray, " B"], longest: int) -> None:
    """Raises an InputError unless all lengths lie in 1 .. longest."""
    if wrong := [length for length in lengths.tolist() if not 1 <= length <= longest]:
        raise InputError(f"a prompt has {wrong[0]} tokens, but rows hold 1 to {longest}: mend its length")


def read_prompts(model: LanguageModel, tokens: jax.Array, lengths: jax.Array | None) -> Prefilled:
    """`Decoder.prefill` inside a program.

    Rows of different lengths are moved to the right, where all end at once. The padding in front of a prompt is a
    document of its own, and nothing of it reaches the next one: so every mixer that keeps packed documents apart reads
    padded prompts exactly.
    """
    if lengths is None:
        read = model.hidden(tokens)
    else:
        length = tokens.shape[1]
        from_left = jnp.arange(length)[None] - (length - lengths)[:, None]
        moved = jnp.take_along_axis(tokens, jnp.maximum(from_left, 0), axis=1)
        read = model.hidden(moved, segment_ids=(from_left >= 0).astype(jnp.int32))
    return Prefilled(logits=model.unembed(read.hidden[:, -1:])[:, 0], state=read.state)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(definition: ModelDefinition, params: Params, tokens: jax.Array, lengths: jax.Array | None) -> Prefilled:
    return read_prompts(definition.merge(params), tokens, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _draw(definition: ModelDefinition, logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    return sample(logits, key, sampling, vocab_size=definition.config.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    definition: ModelDefinition,
    params: Params,
    state: LMState,
    tokens: jax.Array,
    sampling: Sampling,
    key: jax.Array,
) -> Decoded:
    output = definition.merge(params)(tokens[:, None], state)
    logits = output.logits[:, 0]
    drawn = sample(logits, key, sampling, vocab_size=definition.config.vocab_size)
    return Decoded(tokens=drawn, logits=logits, state=output.state)
