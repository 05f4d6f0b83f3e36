"""Matrices in the dtype that they are multiplied in."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.models.parameters import ModelDefinition, Params, define


def as_multiplied(definition: ModelDefinition, params: Params) -> tuple[ModelDefinition, Params]:
    """A model with the same results whose matrices are stored as they are multiplied.

    A matrix in float32 is rounded to the compute dtype whenever the model is called. Here this is done once. The table
    of embeddings stays as it is, for its vectors are not rounded; a head that shares it gets a table of its own.

    Args:
        definition: the model.
        params: its parameters, stacked.
    """
    config, dtype = definition.config, definition.config.compute_dtype
    params = dict(params)
    if config.tie_embeddings and config.compute_dtype != config.param_dtype:
        definition = define(dataclasses.replace(config, tie_embeddings=False))
        params["lm_head"] = params["embedding"]

    def stored(path: Any, param: jax.Array | np.ndarray, dim: int | None) -> jax.Array | np.ndarray:
        is_kept = dim is None or path[0].key == "embedding" or jnp.finfo(param.dtype).bits <= jnp.finfo(dtype).bits
        return param if is_kept else param.astype(dtype)

    return definition, jax.tree.map_with_path(stored, params, definition.summed)
