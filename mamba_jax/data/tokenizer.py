"""Text to token ids and back: raw bytes, or a `tokenizers` JSON file."""

import abc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from jaxtyping import Int

from mamba_jax.config import TokenizerConfig
from mamba_jax.errors import InputError


class Tokenizer(abc.ABC):
    """A reversible map between text and token ids.

    Text never yields the end-of-document id, whatever it spells: only the data pipeline sets document boundaries.

    Attributes:
        vocab_size: V, ids are 0 .. V - 1.
        end_of_document: id that follows every document in the token stream.
        fingerprint: sha256 of what defines the tokenizer; equal fingerprints give equal ids.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str

    @abc.abstractmethod
    def encode_batch(
        self, texts: Sequence[str], *, continues: Sequence[bool] | None = None
    ) -> list[Int[np.ndarray, " T"]]:
        """Token ids of each text, without beginning or end markers.

        Args:
            texts: what to encode.
            continues: whether a text goes on with a document, and so gets no space in front; None is nowhere.

        Raises:
            InputError: a text holds a lone surrogate and so has no UTF-8 form, or what the vocabulary has no ids for.
        """

    @abc.abstractmethod
    def _decode(self, ids: Int[np.ndarray, " T"]) -> str: ...

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Token ids of one text, without beginning or end markers."""
        return self.encode_batch([text])[0]

    def check_prompt(self, prompt: str) -> None:
        """Makes sure that a prompt has ids; an empty one stands for the start of a document.

        Raises:
            InputError: it has no UTF-8 form, or only characters that the vocabulary lacks.
        """
        if prompt and not len(self.encode(prompt)):
            raise InputError(f"the tokenizer has no id for anything in the prompt {prompt!r}: choose another prompt")

    def decode(self, ids: Int[np.ndarray | jax.Array, " T"] | Sequence[int]) -> str:
        """The text of token ids; end-of-document ids are left out, invalid UTF-8 becomes U+FFFD.

        Args:
            ids: token ids in 0 .. V - 1.

        Raises:
            InputError: an id lies outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise InputError(f"token ids must be whole numbers, got {ids.dtype}: convert them")
        ids = ids.astype(np.int64)
        bad = ids[(ids < 0) | (ids >= self.vocab_size)]
        if bad.size:
            raise InputError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size} ids")
        return self._decode(ids[ids != self.end_of_document])


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text holds a lone surrogate at character {error.start}: it is not valid Unicode") from None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0-255, end-of-document as id 256."""

    vocab_size = 257
    end_of_document = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes, end of document 256").hexdigest()

    def encode_batch(
        self, texts: Sequence[str], *, continues: Sequence[bool] | None = None
    ) -> list[Int[np.ndarray, " T"]]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: Int[np.ndarray, " T"]) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        path: the JSON file.
        end_of_document: the token that separates documents.

    Raises:
        InputError: the file is missing or no tokenizer, or the token is unknown or can be spelled by ordinary text.
    """

    def __init__(self, path: str, *, end_of_document: str) -> None:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read tokenizer {path!r}: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"{path!r} is not a tokenizer of the `tokenizers` library: {error}") from None
        # A file may ask for a fixed length, which would silently cut documents, and for special tokens to be read
        # out of plain text, which would let a document forge its own end.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._rest = _without_prefix(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if end_of_document not in vocabulary:
            raise InputError(
                f"tokenizer {path!r} has no token {end_of_document!r}: set tokenizer.end_of_document to one it has"
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = vocabulary[end_of_document]
        if self.end_of_document in self.encode(end_of_document):
            raise InputError(
                f"tokenizer {path!r}: plain text can spell {end_of_document!r}; choose an end_of_document that is "
                'marked "special" among its added_tokens'
            )
        self.fingerprint = hashlib.sha256(data + b"\0" + end_of_document.encode()).hexdigest()

    def encode_batch(
        self, texts: Sequence[str], *, continues: Sequence[bool] | None = None
    ) -> list[Int[np.ndarray, " T"]]:
        for text in texts:
            _utf8(text)
        flags = [False] * len(texts) if continues is None else list(continues)
        starts = iter(self._encode(self._tokenizer, [t for t, flag in zip(texts, flags, strict=True) if not flag]))
        rests = iter(self._encode(self._rest, [t for t, flag in zip(texts, flags, strict=True) if flag]))
        return [next(rests if flag else starts) for flag in flags]

    @staticmethod
    def _encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[Int[np.ndarray, " T"]]:
        try:
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"text that the tokenizer cannot encode: {error}; use one that knows all bytes") from None
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _decode(self, ids: Int[np.ndarray, " T"]) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def _without_prefix(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without the space that it puts in front of a text."""

    def edited(value: Any) -> Any:
        if isinstance(value, list):
            return [edited(item) for item in value if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if not isinstance(value, dict):
            return value
        off = {"add_prefix_space": False, "prepend_scheme": "never"}
        return {key: off[key] if key in off else edited(item) for key, item in value.items()}

    data = json.loads(tokenizer.to_str())
    stages = {key: edited([data[key]]) for key in ("normalizer", "pre_tokenizer")}
    rest = tokenizers.Tokenizer.from_str(json.dumps({**data, **{k: v[0] if v else None for k, v in stages.items()}}))
    rest.encode_special_tokens = True
    return rest


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` describes.

    Raises:
        InputError: the JSON file is missing, damaged or lacks the end-of-document token.
    """
    if config.path is None:
        return ByteTokenizer()
    return JsonTokenizer(config.path, end_of_document=config.end_of_document)
