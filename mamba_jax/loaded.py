"""A model to be called: weights, config and tokenizer of a checkpoint together."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from mamba_jax.data.config import TokenizerConfig
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError
from mamba_jax.export.companions import open_tokenizer
from mamba_jax.export.load import load_model
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text import complete
from mamba_jax.models.config import ModelConfig
from mamba_jax.models.language_model import LMOutput
from mamba_jax.models.parameters import ModelDefinition, Params, define
from mamba_jax.models.state import LMState, with_room

# Token ids or document numbers, in rows of equal length.
Ids = Int[jax.Array | np.ndarray, "B L"] | list[list[int]]


def load(
    path: str | Path,
    *,
    step: int | None = None,
    weights: Literal["weights", "average"] = "weights",
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> "Model":
    """Reads a checkpoint: the directory of a training run, or a folder with `config.json` and safetensors.

    Args:
        path: the folder.
        step: which checkpoint of a training run; None is the newest.
        weights: of a training run, "weights" for those of the last update or "average" for their moving average.
        compute_dtype: dtype of matrix products and activations; None takes that of the checkpoint.

    Raises:
        InputError: the folder is neither, is damaged, or has no such step.
    """
    found = load_model(path, step=step, weights=weights)
    config = found.config if compute_dtype is None else dataclasses.replace(found.config, compute_dtype=compute_dtype)
    return Model(config, jax.tree.map(jnp.asarray, found.params), tokenizer=found.tokenizer)


class Model:
    """A language model with its weights.

    Example:
        model = load("runs/quickstart")
        output = model(tokens)  # output.logits (B, L, V), output.state
        more = model(next_tokens, output.state)
        text = model.complete("The President", num_tokens=100)

    Attributes:
        config: config of the model.
        params: its parameters.
    """

    def __init__(self, config: ModelConfig, params: Params, *, tokenizer: TokenizerConfig | None = None) -> None:
        self.config, self.params, self._tokenizer_config = config, params, tokenizer

    @functools.cached_property
    def definition(self) -> ModelDefinition:
        """Everything about the model but the values of its parameters."""
        return define(self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that lies beside the weights, or that of the run.

        Raises:
            InputError: there is none.
        """
        if self._tokenizer_config is None:
            raise InputError("this checkpoint has no tokenizer: give token ids, or load a folder with tokenizer.json")
        return open_tokenizer(self._tokenizer_config)

    def __call__(
        self,
        tokens: Ids,
        state: LMState | None = None,
        *,
        segment_ids: Ids | None = None,
        max_length: int | None = None,
    ) -> LMOutput:
        """Logits of the next token at every position, and the state after the last; compiled once for each shape.

        Args:
            tokens: ids in [0, vocab_size), (B, L); nested lists and NumPy arrays are accepted, too.
            state: `output.state` of the call with the previous tokens; None starts a sequence.
            segment_ids: document number of each token, (B, L); None means one document per row.
            max_length: most tokens of a document that the state that comes out shall have room for, for models with
                attention; where their state is too small, logits are NaN. None leaves its size as it is, that of the
                tokens of the first call.

        Returns:
            `logits`, (B, L, V) with V the padded vocabulary, and `state`.
        """
        ids = None if segment_ids is None else jnp.asarray(segment_ids)
        output = _forward(self.definition, self.params, jnp.asarray(tokens), state, ids)
        if max_length is None:
            return output
        return dataclasses.replace(output, state=with_room(self.config, output.state, max_length))

    def generate(
        self,
        prompt: Ids,
        *,
        num_tokens: int,
        key: PRNGKeyArray | None = None,
        sampling: SamplingConfig | None = None,
    ) -> Int[jax.Array, "B T"]:
        """Continues a batch of prompts of token ids; see `mamba_jax.generate`. Without a key that of seed 0 is used."""
        return generate(
            self.definition,
            self.params,
            jnp.asarray(prompt),
            num_tokens=num_tokens,
            key=jax.random.key(0) if key is None else key,
            sampling=sampling,
            allowed=None if self._tokenizer_config is None else self.tokenizer.known,
        )

    def complete(
        self, prompt: str, *, num_tokens: int = 128, seed: int = 0, sampling: SamplingConfig | None = None
    ) -> str:
        """Continues a text, until the model ends the document or `num_tokens` are added; returns prompt and all."""
        return complete(
            self.definition,
            self.params,
            self.tokenizer,
            prompt,
            num_tokens=num_tokens,
            key=jax.random.key(seed),
            sampling=sampling,
        )


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    definition: ModelDefinition, params: Params, tokens: jax.Array, state: LMState | None, ids: jax.Array | None
) -> LMOutput:
    return definition.merge(params)(tokens, state, segment_ids=ids)
