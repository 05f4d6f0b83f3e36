"""Tokenises text into shards: `python -m mamba_jax.data.prepare --text FOLDER --output SHARDS`."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import rich.console
import rich.markup
import rich.progress

from mamba_jax import cli
from mamba_jax.data.documents import DocumentReader, Piece
from mamba_jax.data.prepare_flags import arguments_class
from mamba_jax.data.shard_index import ShardIndex
from mamba_jax.data.shard_writer import SHARD_TOKENS, ShardWriter, refuse_existing
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer

# How much text is tokenised in one call. A judgement: enough to keep all cores busy, little enough to bound memory.
_BATCH_BYTES = 4 * 2**20
_BATCH_PIECES = 8192
_PLAIN_SECONDS = 10.0


def write_shards(
    documents: DocumentReader, tokenizer: Tokenizer, folder: Path, *, shard_tokens: int = SHARD_TOKENS
) -> ShardIndex:
    """Tokenises all documents into a new folder of shards, with a progress bar, in constant memory.

    Args:
        documents: the documents to tokenise.
        tokenizer: makes the token ids.
        folder: the new folder; it must not exist, and appears once it is complete.
        shard_tokens: number of token ids in a file.

    Returns:
        The index of the new folder.

    Raises:
        InputError: `folder` exists or cannot be written, or a document is not UTF-8 text.
    """
    with (
        ShardWriter(folder, tokenizer.vocabulary, shard_tokens=shard_tokens) as writer,
        _progress(f"tokenising {documents.name}", documents.total, documents.unit) as advance,
    ):
        for batch in _batches(documents.pieces()):
            texts, continues = [piece.text for piece in batch], [piece.continues for piece in batch]
            for piece, ids in zip(batch, tokenizer.encode_batch(texts, continues=continues), strict=True):
                writer.add(ids, num_bytes=piece.num_bytes, ends_document=piece.ends_document)
            advance(len(batch) if documents.unit == "documents" else sum(piece.num_bytes for piece in batch))
        return writer.finish()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Groups pieces for the tokenizer; a batch ends at `_BATCH_BYTES` of text or at `_BATCH_PIECES` pieces."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.num_bytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _progress(title: str, total: int, unit: Literal["bytes", "documents"]) -> Iterator[Callable[[int], None]]:
    """Shows progress on standard error: a bar on a terminal, elsewhere a line every ten seconds.

    Yields:
        A function that is called with the amount of work done since the last call.
    """
    stream: Any = cli.enduring(sys.stderr)
    console = rich.console.Console(file=stream)
    if console.is_terminal:
        amount = rich.progress.DownloadColumn() if unit == "bytes" else rich.progress.MofNCompleteColumn()
        columns = ("{task.description}", rich.progress.BarColumn(), amount, rich.progress.TimeRemainingColumn())
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(rich.markup.escape(title), total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    done, next_line = 0, time.monotonic() + _PLAIN_SECONDS

    def advance(amount: int) -> None:
        nonlocal done, next_line
        done += amount
        if time.monotonic() >= next_line:
            print(f"{title}: {done / total:.0%} of {total} {unit}", file=stream, flush=True)
            next_line = time.monotonic() + _PLAIN_SECONDS

    print(f"{title}: {total} {unit}", file=stream, flush=True)
    yield advance


def main() -> None:
    """The command line."""
    with cli.one_line_errors():
        arguments = cli.parse(arguments_class(), prog="python -m mamba_jax.data.prepare")
        folder = Path(arguments.output)
        refuse_existing(folder)
        tokenizer = make_tokenizer(arguments.tokenizer_config)
        if tokenizer.lossy:
            print("warning:", tokenizer.lossy, file=sys.stderr)
        documents = arguments.source().open()
        assert isinstance(documents, DocumentReader)
        start = time.monotonic()
        index = write_shards(documents, tokenizer, folder, shard_tokens=arguments.shard_tokens)
        seconds = time.monotonic() - start
        size = sum(shard.size for shard in index.shards)
        print(
            f"{folder}: {index.documents:,} documents, {index.num_bytes:,} bytes of text, {index.tokens:,} tokens "
            f"({index.num_bytes / index.tokens:.3f} bytes a token, vocabulary {index.vocab_size:,}), "
            f"{len(index.shards)} shards of {size:,} bytes in all, {seconds:.1f} s, "
            f"{index.num_bytes / 1e6 / seconds:.1f} MB/s"
        )


if __name__ == "__main__":
    main()
