"""The bytes that each token adds to a text, for text that grows token by token."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import tokenizers

# The token and the one in front of it, None for the first of a document.
TokenBytes = Callable[[int, int | None], bytes]

# Each token's text depends on whether it is the first, and on nothing else; that of the last may grow by a space.
_WORD_DECODERS = ("Metaspace", "WordPiece", "BPEDecoder")
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_characters() -> dict[str, int]:
    """The characters that `ByteLevel` of `tokenizers` writes for the 256 bytes, as GPT-2 does, each with its byte.

    A byte that is a visible Latin-1 character is written as that character; the other 68 are chr(256), chr(257), ...
    """
    own = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    rest = (byte for byte in range(256) if chr(byte) not in own)
    return own | {chr(256 + index): byte for index, byte in enumerate(rest)}


def find_token_bytes(tokenizer: tokenizers.Tokenizer) -> TokenBytes | None:
    """How the text of a tokenizer is put together from its tokens.

    Returns:
        A function of two ids that stand for tokens. None if the tokenizer has a decoder that may change the text of
        tokens further back, so that no text is certain before the last token is known.
    """
    parts = _parts(None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__()))
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return functools.partial(_bytes_of_characters, tokenizer, byte_characters())
    if "ByteFallback" in kinds and _acts_on_tokens(parts):
        return functools.partial(_byte_or_text, tokenizer)
    if not kinds or (len(kinds) == 1 and kinds[0] in _WORD_DECODERS) or _acts_on_tokens(parts):
        return functools.partial(_bytes_behind, tokenizer)
    return None


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoders that act one after the other."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for member in decoder["decoders"] for part in _parts(member)]
    return [decoder]


def _acts_on_tokens(parts: list[dict[str, Any]]) -> bool:
    """Whether decoders change each token by itself, except for a space that is removed in front of the whole text."""
    kinds = [part["type"] for part in parts]
    if not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return False
    whole = parts[kinds.index("Fuse") + 1 :] if "Fuse" in kinds else []
    return not whole or (len(whole) == 1 and (whole[0].get("start"), whole[0].get("stop")) == (1, 0))


def _bytes_of_characters(
    tokenizer: tokenizers.Tokenizer, byte_of: dict[str, int], token: int, before: int | None
) -> bytes:
    """The bytes of a token of `ByteLevel`, where each character is a byte; added tokens may hold other characters."""
    characters = tokenizer.id_to_token(token) or ""
    if all(character in byte_of for character in characters):
        return bytes(byte_of[character] for character in characters)
    return characters.encode()


def _byte_or_text(tokenizer: tokenizers.Tokenizer, token: int, before: int | None) -> bytes:
    """The bytes of a token that may be a byte, such as <0x0A>.

    The library decodes neighbouring bytes together, and replaces all of them if one is wrong. Here, characters that are
    whole stay.
    """
    if (byte := _BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token) or "")) is None:
        return _bytes_behind(tokenizer, token, before)
    # As first of a text, the byte of a space may be removed.
    is_removed = before is None and not _decode(tokenizer, [token])
    return b"" if is_removed else bytes([int(byte[1], 16)])


def _bytes_behind(tokenizer: tokenizers.Tokenizer, token: int, before: int | None) -> bytes:
    """What a token adds to the text of the token in front of it."""
    if before is None:
        return _decode(tokenizer, [token]).encode()
    return _decode(tokenizer, [before, token]).removeprefix(_decode(tokenizer, [before])).encode()


def _decode(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)
