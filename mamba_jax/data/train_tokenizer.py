"""Trains a tokenizer: `python -m mamba_jax.data.train_tokenizer --files PATH --output tokenizer.json`."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from mamba_jax import cli
from mamba_jax.data.documents import DocumentReader, Piece
from mamba_jax.data.prepare_flags import TrainTokenizerArguments, arguments_class
from mamba_jax.data.shard_writer import refuse_existing
from mamba_jax.data.tokenization.training import make_folder, save_tokenizer, train_bpe
from mamba_jax.data.tokenizer import JsonTokenizer
from mamba_jax.errors import InputError

# Text at the start that has to come back from its ids.
_CHECKED_BYTES = 2**20


class _Sample:
    """The first pieces of those that go by."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.texts: list[str] = []
        self.num_bytes = 0
        self._pieces = pieces

    def __iter__(self) -> Iterator[Piece]:
        for piece in self._pieces:
            if self.num_bytes < _CHECKED_BYTES:
                self.texts.append(piece.text)
            self.num_bytes += piece.num_bytes
            yield piece


def check_tokenizer(path: Path, texts: list[str], *, end_of_document: str) -> float:
    """Opens a tokenizer as a run does, and makes sure that texts come back from their ids.

    Returns:
        Bytes of UTF-8 for each token of the texts.

    Raises:
        InputError: a text does not come back.
    """
    tokenizer = JsonTokenizer(str(path), end_of_document=end_of_document)
    found = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, found, strict=True):
        if tokenizer.decode(ids) != text:
            raise InputError(f"{path} loses text: {text[:80]!r} does not come back from its ids; use another text")
    return sum(len(text.encode()) for text in texts) / sum(map(len, found))


def main(prog: str = "python -m mamba_jax.data.train_tokenizer") -> None:
    """The command line.

    Args:
        prog: what it is called by.
    """
    with cli.one_line_errors():
        arguments = cli.parse(arguments_class(TrainTokenizerArguments), prog=prog)
        path = Path(arguments.output)
        refuse_existing(path)
        make_folder(path.parent)
        documents = arguments.source().open()
        assert isinstance(documents, DocumentReader)
        start = time.monotonic()
        pieces = _Sample(documents.pieces())
        tokenizer = train_bpe(
            pieces,
            vocab_size=arguments.vocab_size,
            end_of_document=arguments.end_of_document,
            max_bytes=arguments.max_bytes,
        )
        save_tokenizer(tokenizer, path)
        bytes_a_token = check_tokenizer(path, pieces.texts, end_of_document=arguments.end_of_document)
        seconds, size = time.monotonic() - start, tokenizer.get_vocab_size()
        few = f"this text gives no more than {size:,} tokens" if size < arguments.vocab_size else ""
        for note in filter(None, (documents.note, documents.left_out, few)):
            print(note, file=sys.stderr)
        print(
            f"{path}: {size:,} tokens from {pieces.num_bytes:,} bytes of text, {bytes_a_token:.3f} bytes a token "
            f"at its start, {seconds:.1f} s; a model for it has model.vocab_size {size}"
        )


if __name__ == "__main__":
    main()
