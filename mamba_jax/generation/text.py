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
        definition: of the model.
        params: its parameters.
        tokenizer: of the model's training text.
        prompt: text to continue; empty starts a new document.
        num_tokens: most tokens to add.
        key: a `jax.random.key`.
        sampling: how tokens are drawn.
    """
    ids = [int(token) for token in tokenizer.encode(prompt)] or [tokenizer.end_of_document]
    tokens = generate(
        definition, params, jnp.asarray([ids], jnp.int32), num_tokens=num_tokens, key=key, sampling=sampling
    )
    added = jax.device_get(tokens)[0].tolist()
    if tokenizer.end_of_document in added:
        added = added[: added.index(tokenizer.end_of_document)]
    return prompt + tokenizer.decode(added)
