"""Cuts a long text into pieces at places where tokenizers cut anyway, and decodes files block by block."""

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mamba_jax.data.documents import Piece
from mamba_jax.errors import InputError

# Texts longer than 1 MiB are tokenised in pieces of about that size, which bounds memory.
PIECE_BYTES = 2**20
# Places where a document may be cut into pieces, the best first: behind a single line break, or before a single space.
# There a token ends in any case. Across blank lines, indentation and "\r\n" a token may continue.
_CUTS = (re.compile(r"\S\n(?=\S)"), re.compile(r"\w(?= \w)"))
# How many characters at the end of a piece are searched for such a place: a judgement, far longer than usual lines.
_CUT_WINDOW = 2**14


def text_pieces(text: str, *, amount: int) -> Iterator[Piece]:
    """The pieces of a document that is in memory whole.

    Args:
        text: the document.
        amount: `Piece.amount` of the first piece; the others have 0.
    """
    start, continues = 0, False
    while not continues or start < len(text):
        piece = text[start : start + PIECE_BYTES]
        start += PIECE_BYTES
        if start < len(text):
            start += cut(piece) - PIECE_BYTES
            piece = piece[: cut(piece)]
        yield Piece(
            text=piece,
            num_bytes=utf8_length(piece),
            continues=continues,
            ends_document=start >= len(text),
            amount=0 if continues else amount,
        )
        continues = True


def utf8_length(text: str) -> int:
    """Length of a text in UTF-8, in bytes; a UnicodeEncodeError says that it has no such form."""
    return len(text) if text.isascii() else len(text.encode())


def decoded_pieces(path: Path, blocks: Iterable[bytes], *, start: int = 0) -> Iterator[Piece]:
    """Decodes a document block by block, so that a large file never lies in memory as a whole.

    Args:
        path: the file, for messages.
        blocks: the bytes of the document, none of them empty.
        start: where in the file the document begins, in bytes.

    Raises:
        InputError: the bytes are not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    continues, rest, offset = False, "", start
    blocks = iter(blocks)
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        try:
            text = rest + decoder.decode(block, final=following is None)
        except UnicodeDecodeError as error:
            # The decoder keeps an incomplete character of the last block in front of this one.
            position = offset + len(block) - len(error.object) + error.start
            raise InputError(
                f"{path} is not UTF-8 text: {error.reason} at byte {position}; convert or exclude it"
            ) from None
        end = len(text) if following is None else cut(text)
        if end:
            piece = text[:end]
            yield Piece(text=piece, num_bytes=utf8_length(piece), continues=continues, ends_document=following is None)
            continues = True
        rest, offset, block = text[end:], offset + len(block), following


def cut(text: str) -> int:
    """Where to end a piece so that, if possible, the tokens of the pieces are those of the whole text; see `_CUTS`."""
    start = max(0, len(text) - _CUT_WINDOW)
    for place in _CUTS:
        cuts = [found.end() for found in place.finditer(text, start)]
        if cuts:
            return cuts[-1]
    return text.rfind("\n") + 1 or len(text)
