"""The unit of data that training and evaluation consume."""

import dataclasses
import typing

import jax
import numpy as np
from jaxtyping import Bool, Int


# JAX rebuilds the class around shardings, placeholders and microbatched arrays, which a check of every construction
# would refuse.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LMBatch:
    """One batch of next-token prediction.

    Attributes:
        tokens: input ids, (B, L).
        targets: the id that follows each input, (B, L).
        loss_mask: whether each position counts in the loss, (B, L).
        segment_ids: document number of each input within its row, (B, L); where it changes between t - 1 and t,
            convolution and state are reset before t. None when the state is never reset.
        continues: whether the row continues the document at the end of the same row of the previous batch, (B,); None
            when rows are unrelated to those of the previous batch.
    """

    tokens: Int[jax.Array | np.ndarray, "B L"]
    targets: Int[jax.Array | np.ndarray, "B L"]
    loss_mask: Bool[jax.Array | np.ndarray, "B L"]
    segment_ids: Int[jax.Array | np.ndarray, "B L"] | None
    continues: Bool[jax.Array | np.ndarray, " B"] | None = None
