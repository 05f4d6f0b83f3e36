"""Text generation with a tokenizer: continues a prompt given as text."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text_stream import TextStream
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
    stream = TextStream(tokenizer, prompt, ids)
    return prompt + stream.add(added) + stream.finish()
