"""Turns windows of the token stream into training examples."""

import numpy as np
from jaxtyping import Int

from mamba_jax.data.batch import LMBatch
from mamba_jax.data.config import Documents


def pack(windows: Int[np.ndarray, "B W"], documents: Documents, *, end_of_document: int) -> LMBatch:
    """Makes a batch from windows of L + 1 consecutive tokens: inputs, targets, loss mask and segment ids.

    With s the window, tokens_t = s_t and targets_t = s_{t+1}. In "packed" mode the segment id of position t is the
    number of end-of-document tokens before t: such a token belongs to the document it ends, and is a target like any
    other. Its own target, the first token of an unrelated document, is left out of the loss. In "concatenated" mode
    there are no segments and every target counts.

    Args:
        windows: token ids; W = L + 1.
        documents: the mode, see `DataConfig`.
        end_of_document: id that ends a document.

    Returns:
        A batch of (B, L) arrays.
    """
    tokens_BL, targets_BL = windows[:, :-1], windows[:, 1:]
    if documents == "concatenated":
        return LMBatch(
            tokens=tokens_BL, targets=targets_BL, loss_mask=np.ones(tokens_BL.shape, dtype=bool), segment_ids=None
        )
    ends_BL = tokens_BL == end_of_document
    return LMBatch(
        tokens=tokens_BL,
        targets=targets_BL,
        loss_mask=~ends_BL,
        segment_ids=np.cumsum(ends_BL, axis=1, dtype=np.int32) - ends_BL,
    )
