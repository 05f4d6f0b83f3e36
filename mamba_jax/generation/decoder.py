"""Token-by-token generation: reads whole prompts at once, then draws one token per step."""

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
from mamba_jax.models.state import LMState, init_state, with_room


# Not checked at construction: JAX also builds these classes around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Result of reading prompts.

    Attributes:
        logits: logits of the token after each prompt, (B, V) in float32, V the padded vocabulary.
        state: recurrent state after the last token of each prompt.
    """

    logits: Float[jax.Array, "B V"]
    state: LMState


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """Result of one step.

    Attributes:
        tokens: the token drawn for each row, (B,); -1 where no token could be drawn, see `sample`.
        logits: the logits that the tokens were drawn from, (B, V) in float32.
        state: recurrent state after the tokens that were passed to the step.
    """

    tokens: Int[jax.Array, " B"]
    logits: Float[jax.Array, "B V"]
    state: LMState


class Decoder:
    """Reads prompts and draws tokens, one step at a time, for callers with a loop of their own, such as servers.

    Each method is compiled once for each shape of its arrays. Sampling settings, lengths and keys are arrays, so new
    values of them do not compile anything. Each token takes the same time and memory however many came before, for
    attention without a window that of `max_length` tokens.

    Example:
        decoder = Decoder(definition, params, max_length=4096)
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
        max_length: most tokens of a row, prompt included. A model with attention needs it; where more of a row would
            have to be remembered, logits are NaN. None is any number.

    Raises:
        InputError: attention without a window, and no `max_length`.
    """

    def __init__(self, definition: ModelDefinition, params: Params, *, max_length: int | None = None) -> None:
        self.definition, self.params, self.max_length = definition, params, max_length
        jax.eval_shape(lambda: init_state(definition.config, 1, max_length=max_length))

    def prefill(
        self, tokens: Int[jax.Array | np.ndarray, "B L"], lengths: Int[jax.Array | np.ndarray, " B"] | None = None
    ) -> Prefilled:
        """Reads a batch of prompts; each row gets the result that it would get alone.

        Args:
            tokens: token ids, (B, L); those behind a row's length are ignored.
            lengths: number of tokens in each prompt, (B,), from 1 to L; None means L for all.

        Raises:
            InputError: L is 0 or more than `max_length`, or a length is outside of 1 .. L.
        """
        if tokens.shape[1] == 0:
            raise InputError("the prompt has no tokens: give at least one")
        if lengths is not None:
            check_lengths(np.asarray(lengths), tokens.shape[1])
        if self.max_length is not None and tokens.shape[1] > self.max_length:
            raise InputError(
                f"the prompts have {tokens.shape[1]} tokens, but the decoder's max_length is {self.max_length}: raise "
                "it"
            )
        return _prefill(self.definition, self.max_length, self.params, tokens, lengths)

    def draw(self, logits: Float[jax.Array, "B V"], sampling: Sampling, key: PRNGKeyArray) -> Int[jax.Array, " B"]:
        """Draws a token for every row from logits (B, V); see `sample`."""
        return _draw(self.definition, logits, sampling, key)

    def step(
        self, state: LMState, tokens: Int[jax.Array | np.ndarray, " B"], sampling: Sampling, key: PRNGKeyArray
    ) -> Decoded:
        """Reads one more token of each row and draws the next.

        Args:
            state: recurrent state after all previous tokens.
            tokens: token ids to read, (B,).
            sampling: how to draw, with one setting per row.
            key: a `jax.random.key`; use another one for every step.
        """
        return _step(self.definition, self.params, state, tokens, sampling, key)


def check_lengths(lengths: Int[np.ndarray, " B"], longest: int) -> None:
    """Raises an InputError unless all lengths lie in 1 .. longest."""
    if wrong := [length for length in lengths.tolist() if not 1 <= length <= longest]:
        raise InputError(f"a prompt has {wrong[0]} tokens, but rows hold 1 to {longest}: mend its length")


def read_prompts(
    model: LanguageModel, tokens: jax.Array, lengths: jax.Array | None, *, max_length: int | None
) -> Prefilled:
    """`Decoder.prefill` as a function to be called inside a jitted one, for tokens (B, L) and lengths (B,) or None.

    Prompts of different lengths are moved to the right, so that all end at the same position. The padding in front of a
    prompt is marked as a document of its own (segment 0, the prompt is segment 1). Any mixer that keeps documents apart
    therefore gives exactly the result without padding.
    """
    if lengths is None:
        read = model.hidden(tokens)
    else:
        length = tokens.shape[1]
        from_left = jnp.arange(length)[None] - (length - lengths)[:, None]
        moved = jnp.take_along_axis(tokens, jnp.maximum(from_left, 0), axis=1)
        read = model.hidden(moved, segment_ids=(from_left >= 0).astype(jnp.int32))
    state = read.state if max_length is None else with_room(model.config, read.state, max_length)
    return Prefilled(logits=model.unembed(read.hidden[:, -1:])[:, 0], state=state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    definition: ModelDefinition,
    max_length: int | None,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array | None,
) -> Prefilled:
    return read_prompts(definition.merge(params), tokens, lengths, max_length=max_length)


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
    """The compiled part of `Decoder.step`: reads a token of each row, (B,), and draws the next one."""
    output = definition.merge(params)(tokens[:, None], state)
    logits = output.logits[:, 0]
    drawn = sample(logits, key, sampling, vocab_size=definition.config.vocab_size)
    return Decoded(tokens=drawn, logits=logits, state=output.state)
