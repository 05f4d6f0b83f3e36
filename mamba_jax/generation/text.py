"""Generation from text to text."""

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
    """The prompt and its continuation, up to the end of the document.

    Args:
        definition: the model to run.
        params: its parameters.
        tokenizer: the one that made the model's training text.
        prompt: text to continue; empty starts a new document.
        num_tokens: most tokens to add.
        key: a `jax.random.key`.
        sampling: how tokens are drawn.
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
    """The text that `added` stands for behind the ids of the prompt."""
    # Whether a word begins with a space shows only behind another one. Where the added tokens change the text before
    # them, as bytes that end no character do, a single token of the prompt must stand for all.
    for context in (ids, *([token] for token in dict.fromkeys(reversed(ids)))):
        before, text = tokenizer.decode(context), tokenizer.decode(context + added)
        if text.startswith(before):
            break
    else:
        before, text = "", tokenizer.decode(added)
    continuation = text[len(before) :]
    bare = prompt.rstrip()
    # A tokenizer of words does not see the space that the prompt ends with, and sets its own.
    sees_space = bare == prompt or tokenizer.encode(bare).tolist() != ids
    return continuation if sees_space else continuation.removeprefix(" ")
