"""Trains a byte-level BPE on documents: a vocabulary of the text's own."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mamba_jax.data.documents import Piece
from mamba_jax.data.tokenization.file import library_errors
from mamba_jax.errors import InputError, reason
from mamba_jax.files import replacement

# The 256 bytes and the end of a document.
MIN_VOCAB_SIZE = 257


def train_bpe(
    pieces: Iterable[Piece], *, vocab_size: int, end_of_document: str, max_bytes: int | None = None
) -> tokenizers.Tokenizer:
    """Learns a byte-level BPE, in which every text has ids and comes back from them byte for byte.

    Text is cut into words as GPT-2 does (a word takes the space in front of it; letters, digits and punctuation do not
    mix), and tokens are merged within words from the commonest pair on. The same text gives the same tokenizer. Counts
    of different words are in memory, the text is not.

    Args:
        pieces: the documents.
        vocab_size: V, number of tokens to learn, with the 256 bytes and the end of a document; a short text may give
            fewer. At least 257.
        end_of_document: token that separates documents; it gets the id 0.
        max_bytes: text to learn from, in bytes of UTF-8 from the start of the documents; None takes all.

    Raises:
        InputError: `vocab_size` is below 257, or a document cannot be read.

    Source:
        Sennrich, Haddow & Birch 2016 (arXiv 1508.07909), algorithm 1; over bytes, Radford et al. 2019, section 2.2.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"--vocab-size must be at least {MIN_VOCAB_SIZE}, the 256 bytes and {end_of_document!r}, got {vocab_size}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # What reading raises must not go through the library, which hides its kind.
    failures: list[InputError] = []
    texts = _texts(pieces, max_bytes, failures)
    with library_errors("no tokenizer can be learnt from this text"):
        tokenizer.train_from_iterator(texts, trainer)
    if failures:
        raise failures[0]
    return tokenizer


def _texts(pieces: Iterable[Piece], max_bytes: int | None, failures: list[InputError]) -> Iterator[str]:
    """The texts of the first so many bytes; an error ends them and is put into the list."""
    num_bytes = 0
    try:
        for piece in pieces:
            yield piece.text
            num_bytes += piece.num_bytes
            if max_bytes is not None and num_bytes >= max_bytes:
                return
    except InputError as error:
        failures.append(error)


def make_folder(folder: Path) -> None:
    """Creates a folder that a result will be written to, before the work for it is done.

    Raises:
        InputError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write to {folder}: {reason(error)}") from None


def save_tokenizer(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Writes a tokenizer's JSON file, which appears complete or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with replacement(path) as temporary:
            temporary.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from None
