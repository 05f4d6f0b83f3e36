"""Text generation: one prefill over the prompt, then one compiled loop over single tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, PRNGKeyArray

from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import check_lengths
from mamba_jax.generation.penalties import History
from mamba_jax.generation.rows import NOT_FINITE, Choice, Rows, draw_tokens
from mamba_jax.generation.sampling import Sampling, SamplingConfig, allowed_ids
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.reading.prompts import read_prompts
from mamba_jax.sharding import constrain


def generate(
    definition: ModelDefinition,
    params: Params,
    prompt: Int[jax.Array, "B L"],
    *,
    lengths: Int[np.ndarray | jax.Array, " B"] | None = None,
    num_tokens: int,
    key: PRNGKeyArray,
    sampling: SamplingConfig | None = None,
    allowed: Bool[np.ndarray | jax.Array, " A"] | None = None,
) -> Int[jax.Array, "B T"]:
    """Continues a batch of prompts.

    Only the recurrent state is carried from token to token, so time and memory per token do not depend on how many came
    before; that of attention has room for all tokens from the start. Other values of `sampling` and `lengths` do not
    compile a new program; another `num_tokens` does.

    Args:
        definition: the model to run.
        params: its parameters.
        prompt: token ids in [0, vocab_size), (B, L), L at least 1.
        lengths: number of tokens in each prompt, (B,); each row is continued as it would be alone. None means L for
            all.
        num_tokens: number of tokens to add to every row.
        key: a `jax.random.key`; a row's tokens follow from it and from the row's number, whatever the batch.
        sampling: how tokens are drawn; None draws from the model's distribution at temperature 1.
        allowed: (A,), whether each id may be drawn, such as `Tokenizer.known`: a model may have ids that its tokenizer
            has no token for. Ids from A on are not drawn. None allows all ids below vocab_size.

    Returns:
        The added tokens, (B, num_tokens).

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, no tokens asked for, none allowed, or logits that
            are not finite.
    """
    if num_tokens < 1:
        raise InputError(f"the number of tokens to generate must be positive, got {num_tokens}")
    _check_prompt(prompt, lengths, definition.config.vocab_size)
    allowed_V = allowed_ids(allowed, definition.config.vocab_size)
    settings = Sampling.of([sampling or SamplingConfig()] * prompt.shape[0], vocab_size=definition.config.vocab_size)
    choice = Choice(sampling=settings, allowed=allowed_V)
    tokens = _generate(definition, num_tokens, choice, params, (prompt, lengths), key)
    if jax.device_get(tokens).min() < 0:
        raise InputError(NOT_FINITE)
    return tokens


def _check_prompt(prompt: jax.Array, lengths: np.ndarray | jax.Array | None, vocab_size: int) -> None:
    """Refuses prompts (B, L) without tokens, lengths outside of 1 .. L, and ids that the model does not have."""
    if prompt.shape[1] == 0:
        raise InputError("the prompt has no tokens: give at least one")
    if lengths is not None:
        check_lengths(np.asarray(lengths), prompt.shape[1])
    lowest, highest = int(prompt.min()), int(prompt.max())
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise InputError(f"the prompt has the token id {outside}, but the model's ids are 0 to {vocab_size - 1}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    definition: ModelDefinition,
    num_tokens: int,
    choice: Choice,
    params: Params,
    prompt: tuple[jax.Array, jax.Array | None],
    key: jax.Array,
) -> jax.Array:
    """Reads prompts and draws ids (B, num_tokens) in one program; negative ones stand where a row's logits failed."""
    model, (batch, length) = definition.merge(params), prompt[0].shape
    read = read_prompts(model, *prompt, max_length=length + num_tokens)
    has_penalties = choice.sampling.penalties is not None
    rows = Rows(
        logits=read.logits,
        state=read.state,
        seeds=jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row)))(jnp.arange(batch)),
        position=jnp.zeros(batch, jnp.int32),
        left=jnp.full(batch, num_tokens, jnp.int32),
        history=History.of(*prompt, vocab_size=model.config.vocab_size) if has_penalties else None,
    )
    _, drawn = draw_tokens(model, rows, choice, num_tokens=num_tokens)
    # Replicated on all devices, so that each of several processes can read the whole result.
    return constrain(drawn.tokens, None, None)
