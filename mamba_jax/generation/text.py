"""Text generation with a tokenizer: continues a prompt given as text."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.models.parameters import ModelDefinition, Params


def complete(
    definition: ModelDefinition,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    key: PRNGKeyArray,
    sampling: SamplingConfig | None = None,
) -> str:
    """Continues a text, until the model ends the document or `num_tokens` tokens have been added.

    Args:
        definition: the model to run.
        params: its parameters.
        tokenizer: the one that made the model's training text.
        prompt: text to continue; an empty one starts a new document.
        num_tokens: largest number of tokens to add.
        key: a `jax.random.key`.
        sampling: how tokens are drawn; None draws from the model's distribution at temperature 1.

    Returns:
        The prompt followed by its continuation.
    """
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_document]
    tokens = generate(
        definition,
        params,
        jnp.asarray([ids], jnp.int32),
        num_tokens=num_tokens,
        key=key,
        sampling=sampling,
        allowed=tokenizer.known,
    )
    added = jax.device_get(tokens)[0].tolist()
    if tokenizer.end_of_document in added:
        added = added[: added.index(tokenizer.end_of_document)]
    return prompt + _continuation(tokenizer, prompt, ids, added)


def _continuation(tokenizer: Tokenizer, prompt: str, ids: list[int], added: list[int]) -> str:
    """The text of the ids `added` when they follow those of the prompt.

    It is the difference of two decoded texts, because many tokenizers write the space before a word only if another
    word stands in front.
    """
    # The added ids may change the end of the text before them, for example by completing a character whose first bytes
    # end the prompt. Then a single token of the prompt, tried from the last to the first, replaces the prompt.
    for context in (ids, *([token] for token in dict.fromkeys(reversed(ids)))):
        before, text = tokenizer.decode(context), tokenizer.decode(context + added)
        if text.startswith(before):
            break
    else:
        before, text = "", tokenizer.decode(added)
    continuation = text[len(before) :]
    bare = prompt.rstrip()
    # A tokenizer of whole words ignores a space at the end of the prompt, and puts its own in front of the next word.
    sees_space = bare == prompt or tokenizer.encode(bare).tolist() != ids
    return continuation if sees_space else continuation.removeprefix(" ")
