"""What mixers share that read one token of a whole residual block by one operation."""

from typing import Any

import jax

from mamba_jax.models.layers import Linear, read
from mamba_jax.models.mixers.mixer import BlockInput
from mamba_jax.models.storage.matrix import is_quantized
from mamba_jax.sharding import is_split


def reads_one_token(given: BlockInput, projection: Linear) -> bool:
    """Whether a block reads a single token of a text that grows, on one device, with weights that are not quantised.

    Args:
        given: what the block has.
        projection: one of the mixer's.
    """
    is_one_token = given.is_generating and given.residual.shape[1] == 1 and given.segment_ids is None
    return is_one_token and not is_split() and not is_quantized(projection.kernel)


def matrix_of(layer: Any, *, dtype: str) -> jax.Array:
    """The weights of a projection in the compute dtype."""
    return read(layer.kernel).astype(dtype)
