"""Reads a JSON file of the `tokenizers` library, and refuses what that library would crash on or draw at random."""

import base64
import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

import tokenizers

from mamba_jax.data.tokenization.config import TokenizerConfig
from mamba_jax.data.tokenization.sentencepiece import LEADING_SPACES, sentencepiece_description, spelled_words
from mamba_jax.data.tokenization.tiktoken import tiktoken_description
from mamba_jax.errors import InputError

# A vocabulary of a million tokens takes about 70 MB; a file of more than 256 MiB is something else.
_MAX_BYTES = 256 * 2**20
_MAX_REASON = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer file that has been read and checked.

    Attributes:
        data: what defines the ids: the bytes of the file, and the pattern of a vocabulary of tiktoken.
        tokenizer: the tokenizer that the file describes.
        words: tokens that the model takes for words where a text spells them, and that stand for something else.
        unknown: id of the token that replaces text without a token of its own; None if the tokenizer has no such token.
    """

    data: bytes
    tokenizer: tokenizers.Tokenizer
    words: tuple[str, ...]
    unknown: int | None


def read_tokenizer(config: TokenizerConfig) -> TokenizerFile:
    """Reads a file of the `tokenizers` library, or one that says the same in another format.

    Settings in the file that would change the ids of a text are switched off: truncation and padding would silently cut
    documents, and parsing special tokens from plain text would let a document forge its own end.

    Raises:
        InputError: the file cannot be read, is not a tokenizer, or makes ids at random.
    """
    assert config.path is not None
    path, words = config.path, ()
    data = text = _read(path)
    if config.kind == "sentencepiece":
        description = sentencepiece_description(data, path)
        words = spelled_words(description)
    elif config.kind == "tiktoken":
        assert config.encoding is not None
        description = tiktoken_description(data, path, encoding=config.encoding, end_of_document=config.end_of_document)
        data += config.encoding.encode()
    else:
        description = _parse(data, path)
    if config.kind != "hf_json":
        text = json.dumps(description, ensure_ascii=False).encode()
    model = description.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{path!r} is not a tokenizer of the `tokenizers` library: it holds no model")
    if model.get("dropout"):
        raise InputError(
            f"tokenizer {path!r} has dropout {model['dropout']}, so that one text gets other ids each time: "
            "set model.dropout to null in the file"
        )
    if any(not _is_whole(value) for value in _character_maps(description.get("normalizer"))):
        raise InputError(f"tokenizer {path!r} is damaged: its precompiled_charsmap is cut short; fetch the file anew")
    with library_errors(f"{path!r} is not a tokenizer of the `tokenizers` library"):
        tokenizer = tokenizers.Tokenizer.from_buffer(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    # Only Unigram models name the unknown token by its id.
    token, unknown = model.get("unk_token"), model.get("unk_id")
    return TokenizerFile(
        data=data,
        tokenizer=tokenizer,
        words=words,
        unknown=unknown if token is None else tokenizer.token_to_id(token),
    )


def _parse(data: bytes, path: str) -> dict[str, Any]:
    """The JSON object of a file of the `tokenizers` library."""
    what = f"{path!r} is not a tokenizer of the `tokenizers` library"
    try:
        description = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{what}: {_reason(error)} (tokenizer.kind says what a file is: hf_json, sentencepiece or tiktoken)"
        ) from None
    if not isinstance(description, dict):
        raise InputError(f"{what}: it holds no JSON object")
    return description


@contextlib.contextmanager
def library_errors(message: str, *, advice: str = "") -> Iterator[None]:
    """Context manager: turns errors of the `tokenizers` library, including panics of its Rust code, into `InputError`.

    Args:
        message: what could not be done; the library's reason is added behind it.
        advice: what to do about it, added at the end.
    """
    try:
        yield
    except BaseException as error:
        # The library raises Exception itself; a panic derives from BaseException and has no name to import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message}: {_reason(error)}{advice}") from None


def within_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without the settings that add a space in front of a text or take spaces away there."""
    description = json.loads(tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        description[part] = _without_prefix(description[part])
    bare = tokenizers.Tokenizer.from_str(json.dumps(description))
    bare.encode_special_tokens = True
    return bare


def without_prefix_space(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    r"""The tokenizer without the setting that adds a space in front of a text, for text in the middle of a document.

    Returned only if it encodes "b" as the original encodes the "b" of "a\nb". Tokenizers that add a space at the start
    of every line differ there, and are returned unchanged.
    """
    bare = within_text(tokenizer)
    head, rest = "a\n", "b"
    return bare if _surface(tokenizer, head) + _surface(bare, rest) == _surface(tokenizer, head + rest) else tokenizer


def _read(path: str) -> bytes:
    """Reads a tokenizer's file; raises an InputError if it is not a regular file or is far too large."""
    try:
        # A pipe would be waited for, and a device never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"tokenizer {path!r} is not a regular file: give the path of a tokenizer's JSON file")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read tokenizer {path!r}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read tokenizer {path!r}: {error}") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path!r} is larger than {_MAX_BYTES:,} bytes: no tokenizer is; give a tokenizer's JSON file")
    return data


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} ..."


def _character_maps(part: Any) -> Iterator[Any]:
    """Every character map of a normalizer, which may nest others."""
    if isinstance(part, dict):
        if "precompiled_charsmap" in part:
            yield part["precompiled_charsmap"]
        part = list(part.values())
    if isinstance(part, list):
        for member in part:
            yield from _character_maps(member)


def _is_whole(character_map: Any) -> bool:
    """Whether the map holds the table whose size it states; the library would take that much memory unseen."""
    try:
        raw = base64.b64decode(character_map)
    except (TypeError, ValueError):
        return False
    return 4 + int.from_bytes(raw[:4], "little") <= len(raw)


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Removes what adds a prefix from the JSON of a normalizer or pre-tokenizer; None if nothing remains of it."""
    match part:
        case {"type": "Sequence", **members}:
            kept = {name: [m for m in map(_without_prefix, value) if m is not None] for name, value in members.items()}
            return {"type": "Sequence", **kept}
        case {"type": "Prepend"}:
            return None
        case {"type": "Replace", "pattern": {"Regex": pattern}} if pattern == LEADING_SPACES:
            return None
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": _}:
            return {**part, "add_prefix_space": False}
        case _:
            return part


def _surface(tokenizer: tokenizers.Tokenizer, text: str) -> str:
    """What the tokenizer's model gets to see of a text."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text
