"""Text generation: one prefill over the prompt, then one compiled loop over single tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, PRNGKeyArray

from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import check_lengths, read_prompts
from mamba_jax.generation.sampling import Sampling, SamplingConfig, sample
from mamba_jax.models.parameters import ModelDefinition, Params
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
        key: a `jax.random.key`.
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
    allowed_V = _allowed(allowed, definition.config.vocab_size)
    settings = Sampling.of([sampling or SamplingConfig()] * prompt.shape[0])
    tokens = _generate(definition, num_tokens, settings, params, (prompt, lengths), allowed_V, key)
    if jax.device_get(tokens).min() < 0:
        raise InputError(
            "the model's logits are not finite, so that no token can be drawn: its weights are damaged or too large"
        )
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


def _allowed(allowed: np.ndarray | jax.Array | None, vocab_size: int) -> np.ndarray:
    """Whether each id of the model may be drawn."""
    allowed_V = np.ones(vocab_size, bool)
    if allowed is not None:
        given = np.asarray(allowed)[:vocab_size]
        allowed_V = np.pad(given, (0, vocab_size - len(given)))
    if not allowed_V.any():
        raise InputError(f"none of the model's ids 0 to {vocab_size - 1} may be drawn: allow at least one")
    return allowed_V


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    definition: ModelDefinition,
    num_tokens: int,
    sampling: Sampling,
    params: Params,
    prompt: tuple[jax.Array, jax.Array | None],
    allowed_V: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Reads prompts and draws ids (B, num_tokens) in one program; -1 stands where the highest logit is not finite."""
    model = definition.merge(params)
    draw = functools.partial(sample, sampling=sampling, vocab_size=definition.config.vocab_size, allowed=allowed_V)
    # The last token is drawn, and never read.
    read = read_prompts(model, *prompt, max_length=prompt[0].shape[1] + num_tokens - 1)
    keys = jax.random.split(key, num_tokens)
    first_B = draw(read.logits, keys[0])

    def step(carry, key):
        token_B, state = carry
        output = model(token_B[:, None], state)
        next_B = draw(output.logits[:, 0], key)
        return (next_B, output.state), next_B

    _, rest_TB = jax.lax.scan(step, (first_B, read.state), keys[1:])
    # Replicated on all devices, so that each of several processes can read the whole result.
    return constrain(jnp.concatenate([first_B[:, None], rest_TB.T], axis=1), None, None)
