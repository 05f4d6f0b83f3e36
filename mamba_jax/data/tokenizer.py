"""Text to token ids and back: bytes, ids as numbers, or a file of `tokenizers`, SentencePiece or tiktoken."""

import abc
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers import decoders, models, pre_tokenizers

from mamba_jax.data.config import TokenizerConfig, TokenizerKind
from mamba_jax.data.tokenization.chat import ChatTemplate, find_template
from mamba_jax.data.tokenization.file import library_errors, read_tokenizer, within_text, without_prefix_space
from mamba_jax.data.tokenization.loss import find_loss
from mamba_jax.data.tokenization.token_bytes import TokenBytes, byte_characters, find_token_bytes
from mamba_jax.data.vocabulary import Vocabulary
from mamba_jax.errors import InputError

# A model needs an embedding row for every id up to the highest. 16 million is far above real vocabularies (up to
# 10**6).
_MAX_IDS = 2**24


class Tokenizer(abc.ABC):
    """A reversible map between text and token ids.

    Text never yields the end-of-document id, whatever it spells: only the data pipeline sets document boundaries.

    Attributes:
        vocab_size: V, ids are 0 .. V - 1.
        end_of_document: id that follows every document in the token stream.
        fingerprint: sha256 of what defines the tokenizer; equal fingerprints give equal ids.
        known: (V,), whether each id stands for a token; the numbering of tokens may have gaps.
        lossy: a warning, in one sentence, if different texts get equal ids, so that bits per byte are too low; None if
            text can be recovered from its ids.
        chat_template: how messages are written; None if that is not known.
        special_texts: how its special tokens are spelt.
        runs_in_workers: whether several processes tokenise a long text faster; then it can be pickled.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str
    known: Bool[np.ndarray, " V"]
    chat_template: ChatTemplate | None = None
    special_texts: tuple[str, ...] = ()
    runs_in_workers: ClassVar[bool] = False

    @property
    def vocabulary(self) -> Vocabulary:
        """What shards and batches need to know of the ids."""
        return Vocabulary(size=self.vocab_size, end_of_document=self.end_of_document, fingerprint=self.fingerprint)

    @property
    @abc.abstractmethod
    def lossy(self) -> str | None: ...

    @abc.abstractmethod
    def encode_batch(
        self, texts: Sequence[str], *, continues: Sequence[bool] | None = None
    ) -> list[Int[np.ndarray, " T"]]:
        """Token ids of each text, without beginning or end markers.

        A long document may be encoded in pieces. The ids are those of the whole document if every cut is behind a line
        break between two visible characters and no token contains a line break together with other characters. (They
        differ for a normalizer that acts at the ends of a text, such as `Strip`: it acts on each piece.)

        Args:
            texts: the texts to encode.
            continues: for each text, whether it continues a document; then the tokenizer adds no space in front of it,
                as some tokenizers do at the start of a text. None means that no text does.

        Raises:
            InputError: a text holds a lone surrogate, so that it has no UTF-8 form, or characters that the vocabulary
                has no ids for.
        """

    @abc.abstractmethod
    def to_json(self) -> str:
        """The tokenizer as a JSON file of the `tokenizers` library, for other programs; it gives the same ids.

        The file adds no beginning or end markers. It cannot say that plain text must not become special tokens: a
        program that loads it must set `encode_special_tokens` to get the same ids for text that spells one.
        """

    @property
    @abc.abstractmethod
    def token_bytes(self) -> TokenBytes | None:
        """A function that gives the bytes which a token adds to the text, from its id and the one in front of it.

        For ids of `standing`, the bytes of all, joined and read as UTF-8, are what `decode` gives. The id in front is
        None for the first of a document. Of a run of byte tokens (<0x0A>) that is not UTF-8, `decode` replaces all
        characters, and this the wrong bytes alone. The property is None if no token's text is certain before the last.
        """

    @abc.abstractmethod
    def _decode(self, ids: Int[np.ndarray, " T"]) -> str: ...

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Token ids of one text, without beginning or end markers."""
        return self.encode_batch([text])[0]

    def encode_markup(self, text: str, *, continues: bool) -> Int[np.ndarray, " T"]:
        """Token ids of a text in which special tokens are spelt out and meant, as in what a chat template writes.

        Args:
            text: the text; it is not from a stranger, who could end the document with it.
            continues: see `encode_batch`.
        """
        return self.encode_batch([text], continues=[continues])[0]

    def check_prompt(self, prompt: str) -> None:
        """Makes sure that a prompt has ids; an empty one stands for the start of a document.

        Raises:
            InputError: it has no UTF-8 form, or only characters that the vocabulary lacks.
        """
        if prompt and not len(self.encode(prompt)):
            raise InputError(f"the tokenizer has no id for anything in the prompt {prompt!r}: choose another prompt")

    def decode(self, ids: Int[np.ndarray | jax.Array, " T"] | Sequence[int]) -> str:
        """The text of token ids; end-of-document ids and ids without a token are left out, invalid UTF-8 is U+FFFD.

        Args:
            ids: token ids in 0 .. V - 1.

        Raises:
            InputError: an id lies outside the vocabulary.
        """
        return self._decode(self._standing(ids))

    def standing(self, ids: Int[np.ndarray | jax.Array, " T"] | Sequence[int]) -> Int[np.ndarray, " S"]:
        """The ids that stand for text: without end-of-document ids and ids without a token.

        Args:
            ids: token ids in 0 .. V - 1, (T,).

        Returns:
            Those that `decode` turns into text, (S,) int64, in their order.

        Raises:
            InputError: an id lies outside the vocabulary.
        """
        return self._standing(ids)

    def _standing(self, ids: Any) -> Int[np.ndarray, " S"]:
        """The checked ids of `standing`; what is no id at all gets a line, too."""
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise InputError(f"token ids must be whole numbers, got {ids.dtype}: convert them")
        ids = ids.astype(np.int64)
        bad = ids[(ids < 0) | (ids >= self.vocab_size)]
        if bad.size:
            raise InputError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size} ids")
        return ids[(ids != self.end_of_document) & self.known[ids]]


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

    known = np.ones(257, bool)
    lossy = None
    token_bytes = staticmethod(lambda token, before: bytes([token]))

    def encode_batch(
        self, texts: Sequence[str], *, continues: Sequence[bool] | None = None
    ) -> list[Int[np.ndarray, " T"]]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: Int[np.ndarray, " T"]) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_characters(), []))
        # One token a character leaves nothing for a split into words to do.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        return tokenizer.to_str()


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        path: the JSON file, or one of another kind that says the same.
        end_of_document: the token that separates documents.
        kind: see `TokenizerConfig`; not "byte".
        encoding: see `TokenizerConfig`.

    Raises:
        InputError: the file is missing, is not a tokenizer or makes ids at random, or the token is unknown or can be
            spelled by ordinary text.
    """

    runs_in_workers = True

    def __init__(
        self, path: str, *, end_of_document: str, kind: TokenizerKind = "hf_json", encoding: str | None = None
    ) -> None:
        file = read_tokenizer(TokenizerConfig(kind=kind, path=path, end_of_document=end_of_document, encoding=encoding))
        self._tokenizer = file.tokenizer
        self._words = re.compile("|".join(map(re.escape, file.words))) if file.words else None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        _check_vocabulary(vocabulary, path)
        if end_of_document not in vocabulary:
            raise InputError(
                f"tokenizer {path!r} has no token {end_of_document!r}: set tokenizer.end_of_document to one it has"
                + _named(sorted(token.content for token in self._tokenizer.get_added_tokens_decoder().values()))
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.known = np.zeros(self.vocab_size, bool)
        self.known[list(vocabulary.values())] = True
        self.end_of_document = vocabulary[end_of_document]
        self.fingerprint = hashlib.sha256(file.data + b"\0" + end_of_document.encode()).hexdigest()
        self._set_apart(end_of_document, file.unknown, path)

    def _set_apart(self, end_of_document: str, unknown: int | None, path: str) -> None:
        """Finds the ids that plain text must never get: those of special tokens, except the one for unknown text.

        Raises:
            InputError: plain text can spell the end-of-document token.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        if unknown == self.end_of_document or (
            self.end_of_document not in special
            and self.end_of_document in self._library_ids(self._tokenizer, [end_of_document])[0]
        ):
            names = sorted(added[i].content for i in special - {unknown})
            raise InputError(
                f"tokenizer {path!r}: plain text can spell {end_of_document!r}; choose an end_of_document that is "
                f'marked "special" among its added_tokens' + (_named(names) or ", which has none yet: add one")
            )
        self.special_texts = tuple(sorted({end_of_document, *(added[i].content for i in special)}))
        self._is_special = np.zeros(self.vocab_size, bool)
        self._is_special[list({self.end_of_document, *special} - {unknown})] = True

    def __getstate__(self) -> dict[str, Any]:
        derived = {"_rest_of_document", "_rest_of_word", "_with_markup", "token_bytes", "lossy"}
        return {name: value for name, value in vars(self).items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # The library stores all of a tokenizer but this.
        self._tokenizer.encode_special_tokens = True

    @functools.cached_property
    def _rest_of_document(self) -> tokenizers.Tokenizer:
        return without_prefix_space(self._tokenizer)

    @functools.cached_property
    def _rest_of_word(self) -> tokenizers.Tokenizer:
        return self._rest_of_document if self._words is None else within_text(self._tokenizer)

    @functools.cached_property
    def _with_markup(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Tokenizers that know special tokens in a text: for the start of a document, and for the rest of it."""
        # The library does not store that special tokens are not to be known.
        copies = [tokenizers.Tokenizer.from_str(each.to_str()) for each in (self._tokenizer, self._rest_of_document)]
        return copies[0], copies[1]

    def encode_markup(self, text: str, *, continues: bool) -> Int[np.ndarray, " T"]:
        """See `Tokenizer.encode_markup`."""
        _utf8(text)
        return self._library_ids(self._with_markup[continues], [text])[0]

    @functools.cached_property
    def token_bytes(self) -> TokenBytes | None:
        return find_token_bytes(self._tokenizer)

    @functools.cached_property
    def lossy(self) -> str | None:
        return find_loss(self.encode_batch)

    def encode_batch(
        self, texts: Sequence[str], *, continues: Sequence[bool] | None = None
    ) -> list[Int[np.ndarray, " T"]]:
        """See `Tokenizer.encode_batch`; texts that continue a document are encoded apart from those that begin one."""
        for text in texts:
            _utf8(text)
        flags = [False] * len(texts) if continues is None else list(continues)
        starts = iter(self._encode([t for t, flag in zip(texts, flags, strict=True) if not flag], continues=False))
        rests = iter(self._encode([t for t, flag in zip(texts, flags, strict=True) if flag], continues=True))
        return [next(rests if flag else starts) for flag in flags]

    def _encode(self, texts: list[str], *, continues: bool) -> list[Int[np.ndarray, " T"]]:
        """Ids of texts that all begin, or all continue, a document."""
        if not texts:
            return []
        return self._encode_by(self._rest_of_document if continues else self._tokenizer, texts)

    def _encode_by(self, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[Int[np.ndarray, " T"]]:
        return [
            self._encode_apart(tokenizer, text)
            if self._is_special[ids].any() or (self._words is not None and self._words.search(text))
            else ids
            for text, ids in zip(texts, self._library_ids(tokenizer, texts), strict=True)
        ]

    def _encode_apart(self, tokenizer: tokenizers.Tokenizer, text: str) -> Int[np.ndarray, " T"]:
        """Ids of a text that spells special tokens which the model itself knows: it is cut within each of them."""
        with library_errors("text that the tokenizer cannot encode"):
            encoding = tokenizer.encode(text, add_special_tokens=False)
        cuts = [0]
        for index, token, (start, end) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
            is_word = self._words is not None and self._words.fullmatch(text[start:end])
            if not self._is_special[index] and not (is_word and text[start:end] == token):
                continue
            if end - start < 2:
                raise InputError(
                    f"text spells the special token {token!r} by the one character {text[start:end]!r}: remove it "
                    "from the text"
                )
            cuts.append(start + 1)
        if len(cuts) == 1:
            return np.array(encoding.ids, dtype=np.int32)
        first, *rest = [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]
        return np.concatenate(self._encode_by(tokenizer, [first]) + self._encode_by(self._rest_of_word, rest))

    @staticmethod
    def _library_ids(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[Int[np.ndarray, " T"]]:
        with library_errors("text that the tokenizer cannot encode", advice="; use one that knows all bytes"):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _decode(self, ids: Int[np.ndarray, " T"]) -> str:
        with library_errors("ids that the tokenizer cannot decode"):
            return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        # The post-processor would add beginning and end markers, which the model has never seen.
        return json.dumps({**json.loads(self._tokenizer.to_str()), "post_processor": None}, ensure_ascii=False)


def _named(tokens: list[str]) -> str:
    return f": {', '.join(map(repr, tokens[:8]))}" if tokens else ""


def _check_vocabulary(vocabulary: dict[str, int], path: str) -> None:
    owners: dict[int, str] = {}
    for token, index in vocabulary.items():
        if index >= _MAX_IDS:
            raise InputError(f"tokenizer {path!r} gives {token!r} the id {index}; ids end at {_MAX_IDS - 1}: renumber")
        if owners.setdefault(index, token) != token:
            raise InputError(f"tokenizer {path!r} gives {owners[index]!r} and {token!r} the same id {index}: renumber")


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` describes.

    Raises:
        InputError: the JSON file is missing, damaged or lacks the end-of-document token, or a chat template cannot be
            read.
    """
    if config.num_ids is not None:
        # Imported here: the module derives its tokenizer from this one's.
        from mamba_jax.data.tokenization.ids import IdTokenizer

        return IdTokenizer(config.num_ids)
    if config.path is None:
        tokenizer, end = ByteTokenizer(), ""
    else:
        end = config.end_of_document
        tokenizer = JsonTokenizer(config.path, end_of_document=end, kind=config.kind, encoding=config.encoding)
    tokenizer.chat_template = find_template(config.path, config.chat_template, end_of_document=end)
    return tokenizer
