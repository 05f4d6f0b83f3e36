"""What every source of text gives: documents in a fixed order, one piece of text at a time."""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A document, or a part of one too long to be held whole.

    Attributes:
        text: the piece.
        num_bytes: its length in UTF-8.
        continues: it goes on with the document of the piece before.
        ends_document: no further piece of this document follows.
    """

    text: str
    num_bytes: int
    continues: bool
    ends_document: bool


class DocumentReader(abc.ABC):
    """Documents in a fixed order.

    Attributes:
        name: of the source, for messages.
        identity: JSON value that changes whenever the documents may have changed.
        total: amount of work, in `unit`.
        unit: what progress is counted in.
    """

    name: str
    identity: Any
    total: int
    unit: Literal["bytes", "documents"]

    @abc.abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All documents, in order.

        Raises:
            InputError: a document cannot be read or is not UTF-8 text, or there is none at all.
        """
