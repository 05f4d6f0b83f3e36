"""The interface of sources of text: documents in a fixed order, read one piece at a time."""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from mamba_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A document, or a part of one that is too long to be held in memory whole.

    Attributes:
        text: the text of the piece.
        num_bytes: length of the text in UTF-8.
        continues: whether it continues the document of the previous piece.
        ends_document: whether it is the last piece of its document.
        counts: whether its tokens count in the loss; None in text of which all do.
        has_markup: whether special tokens that it spells are those tokens, and not ordinary text.
        amount: how far the source has been read since the last piece, in the reader's `unit`, for the progress bar;
            None is the bytes of the text, or one document.
    """

    text: str
    num_bytes: int
    continues: bool
    ends_document: bool
    counts: bool | None = None
    has_markup: bool = False
    amount: int | None = None


class DocumentReader(abc.ABC):
    """Documents in a fixed order.

    Attributes:
        name: name of the source, for messages.
        identity: JSON value that changes whenever the documents may have changed; tokenised text is cached under it.
        total: size of the source in `unit`, for the progress bar; 0 if it is not known.
        unit: unit that progress is counted in.
        note: what to tell about the choice of the documents before they are tokenised, in one line; may be empty.
        is_supervised: whether its pieces say of each token if it counts in the loss.
    """

    name: str
    identity: Any
    total: int
    unit: Literal["bytes", "documents"]
    note: str = ""
    is_supervised: bool = False

    def read_for(self, tokenizer: Tokenizer) -> None:
        """Is told which tokenizer will encode the documents, before `identity` and `pieces` are asked for."""
        del tokenizer

    @property
    def left_out(self) -> str:
        """What the last `pieces` passed over, in words; empty if that is nothing."""
        return ""

    @abc.abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All documents, in order.

        Raises:
            InputError: a document cannot be read or is not UTF-8 text, or there is none at all.
        """
