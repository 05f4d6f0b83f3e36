"""Parameters as a program wants them that reads them once for every token."""

from typing import Literal

from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.storage.as_multiplied import as_multiplied
from mamba_jax.models.storage.int8 import quantize

Weights = Literal["exact", "int8"]


def for_decoding(
    definition: ModelDefinition, params: Params, *, weights: Weights = "exact"
) -> tuple[ModelDefinition, Params]:
    """A model whose matrices are stored as a step reads them.

    Args:
        definition: the model.
        params: its parameters, stacked.
        weights: "exact", for what `as_multiplied` gives, with the same results; or "int8" for what `quantize` gives.
    """
    if weights == "int8":
        return definition, quantize(definition, params)
    return as_multiplied(definition, params)
