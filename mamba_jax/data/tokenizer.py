"""Text to token ids and back: raw bytes, or a `tokenizers` JSON file."""

import abc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers

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
    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        """Token ids of each text, without beginning or end markers.

        Raises:
            InputError: a text holds a lone surrogate and so has no UTF-8 form, or what the vocabulary has no ids for.
        """

    @abc.abstractmethod
    def to_json(self) -> str:
        """A file of the `tokenizers` library with the same ids, for programs that read nothing else.

        The file adds no beginning or end markers. Whoever loads it sets `encode_special_tokens`, which it cannot hold,
        so that text that spells a special token does not become one; and `decode` keeps what is no end of document.
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

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: Int[np.ndarray, " T"]) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        tokenizer = tokenizers.Tokenizer(models.BPE(_byte_characters(), []))
        # One token a character leaves nothing for a split into words to do.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        return tokenizer.to_str()


def _byte_characters() -> dict[str, int]:
    """The byte that every character of the library's byte level stands for (shown ones are their own Latin-1)."""
    own = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    rest = (byte for byte in range(256) if chr(byte) not in own)
    return own | {chr(256 + index): byte for index, byte in enumerate(rest)}


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

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        for text in texts:
            _utf8(text)
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"text that the tokenizer cannot encode: {error}; use one that knows all bytes") from None
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _decode(self, ids: Int[np.ndarray, " T"]) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        # What adds markers is left out: the model never saw any.
        return json.dumps({**json.loads(self._tokenizer.to_str()), "post_processor": None}, ensure_ascii=False)


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` describes.

    Raises:
        InputError: the JSON file is missing, damaged or lacks the end-of-document token.
    """
    if config.path is None:
        return ByteTokenizer()
    return JsonTokenizer(config.path, end_of_document=config.end_of_document)
