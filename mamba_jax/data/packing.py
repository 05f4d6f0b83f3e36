"""Turns windows of the token stream into training examples."""

import numpy as np
from jaxtyping import Int, UInt8

from mamba_jax.data.batch import LMBatch
from mamba_jax.data.config import Documents
from mamba_jax.data.shards import COUNTS, ENDS


def pack(
    windows: Int[np.ndarray, "B W"],
    documents: Documents,
    *,
    end_of_document: int,
    flags: UInt8[np.ndarray, "B W"] | None = None,
) -> LMBatch:
    """Makes a batch from windows of L + 1 consecutive tokens: inputs, targets, loss mask and segment ids.

    With s the window, tokens_t = s_t and targets_t = s_{t+1}. In "packed" mode the segment id of position t is the
    number of end-of-document tokens before t: such a token belongs to the document it ends, and is a target like any
    other. Its own target, the first token of an unrelated document, is left out of the loss. In "concatenated" mode
    there are no segments and every target counts. Flags say in place of ids where documents end, and which targets
    count: a chat may hold the end-of-document token behind each of its turns.

    Args:
        windows: token ids; W = L + 1.
        documents: the mode, see `DataConfig`.
        end_of_document: id that ends a document.
        flags: `COUNTS` and `ENDS` of each token, see `mamba_jax.data.shards`; None goes by the ids, and all count.

    Returns:
        A batch of (B, L) arrays.
    """
    tokens_BL, targets_BL = windows[:, :-1], windows[:, 1:]
    counts_BL = np.ones(tokens_BL.shape, dtype=bool) if flags is None else flags[:, 1:] & COUNTS != 0
    if documents == "concatenated":
        return LMBatch(tokens=tokens_BL, targets=targets_BL, loss_mask=counts_BL, segment_ids=None)
    ends_BL = tokens_BL == end_of_document if flags is None else flags[:, :-1] & ENDS != 0
    return LMBatch(
        tokens=tokens_BL,
        targets=targets_BL,
        loss_mask=counts_BL & ~ends_BL,
        segment_ids=np.cumsum(ends_BL, axis=1, dtype=np.int32) - ends_BL,
    )
