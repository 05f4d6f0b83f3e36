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
        targets: id that follows each input, (B, L).
        loss_mask: positions that count in the loss, (B, L).
        segment_ids: document number of each input within its row, (B, L), or None when the state runs on across
            documents. A change of number between t - 1 and t resets convolution and state before t.
        continues: rows whose first input goes on with the document that the same row of the batch before ended in,
            (B,); None when rows have nothing to do with those of the batch before.
    """

    tokens: Int[jax.Array | np.ndarray, "B L"]
    targets: Int[jax.Array | np.ndarray, "B L"]
    loss_mask: Bool[jax.Array | np.ndarray, "B L"]
    segment_ids: Int[jax.Array | np.ndarray, "B L"] | None
    continues: Bool[jax.Array | np.ndarray, " B"] | None = None
