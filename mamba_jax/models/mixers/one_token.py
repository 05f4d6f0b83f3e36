"""What mixers share that read one token of a whole residual block by one operation."""

from typing import Any

import jax

import pallas_kernels
from mamba_jax.models.mixers.mixer import BlockInput
from mamba_jax.models.storage.matrix import LowRank, Quantized, read_matrix
from mamba_jax.sharding import is_split


def is_by_kernels(config: Any) -> bool:
    """Whether the operation is one of kernels: by name, or by default where they run.

    Args:
        config: of a mixer, with `has_step` and `step_implementation`.
    """
    name = config.step_implementation
    return config.has_step and (name == "triton" or (name is None and pallas_kernels.has_step_kernels()))


def is_one_operation(config: Any, given: BlockInput) -> bool:
    """Whether a block reads a single token of a text that grows, on one device, and has an operation for that.

    Args:
        config: see `is_by_kernels`.
        given: what the block has.
    """
    is_wanted = is_by_kernels(config) or (config.has_step and config.step_implementation == "xla")
    is_one_token = given.is_generating and given.residual.shape[1] == 1 and given.segment_ids is None
    return is_wanted and is_one_token and not is_split()


def matrices_of(mixer: Any, *names: str, dtype: str) -> dict[str, jax.Array]:
    """The weights of projections as an operation takes them, by name: in the compute dtype, or int8 and `..._scale`."""
    found = {}
    for name in names:
        matrix = read_matrix(getattr(mixer, name).kernel)
        assert not isinstance(matrix, LowRank), "adapters are merged before a model generates"
        if isinstance(matrix, Quantized):
            found |= {name: matrix.qvalue, f"{name}_scale": matrix.scale[0]}
        else:
            found[name] = matrix.astype(dtype)
    return found
