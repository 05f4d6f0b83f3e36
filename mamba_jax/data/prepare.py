"""Tokenises text into shards: `python -m mamba_jax.data.prepare --files PATH --output SHARDS`."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
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
from mamba_jax.data.prepare_flags import PrepareArguments, arguments_class
from mamba_jax.data.shard_index import INDEX_VERSION, ShardIndex
from mamba_jax.data.shard_writer import SHARD_TOKENS, ShardWriter, refuse_existing
from mamba_jax.data.tokenization.stream import encode_batches
from mamba_jax.data.tokenizer import Tokenizer, make_tokenizer

# How much text is tokenised in one call, or by one process at a time. A judgement: many documents, so that a message to
# a process costs nothing beside them, and little memory, of which a BPE takes a hundred times as much.
_BATCH_BYTES = 2**20
_BATCH_PIECES = 8192
_PLAIN_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_shards` has done.

    Attributes:
        index: the index of the new folder.
        new_bytes: text that was tokenised now, and not by a call that was interrupted before.
        seconds: how long that took, with reading again over the rest.
    """

    index: ShardIndex
    new_bytes: int
    seconds: float


def write_shards(
    documents: DocumentReader,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
) -> Written:
    """Tokenises all documents into a new folder of shards, with a progress bar, in constant memory.

    If an earlier call for the same documents, tokenizer and folder was interrupted, its finished shards are kept: their
    text is read again and not tokenised again. The result depends neither on that nor on the number of workers.

    Args:
        documents: the documents to tokenise.
        tokenizer: makes the token ids.
        folder: the new folder; it must not exist, and appears once it is complete.
        shard_tokens: number of token ids in a file.
        workers: number of processes that tokenise a long text; None takes as many as there are cores.

    Raises:
        InputError: `folder` exists or cannot be written, or a document is not UTF-8 text.
    """
    workers = _cores() if workers is None else workers
    key = json.dumps(
        [INDEX_VERSION, documents.identity, tokenizer.fingerprint, shard_tokens, _BATCH_BYTES, _BATCH_PIECES],
        sort_keys=True,
    )
    start = time.monotonic()
    with (
        ShardWriter(
            folder,
            tokenizer.vocabulary,
            shard_tokens=shard_tokens,
            key=hashlib.sha256(key.encode()).hexdigest(),
            has_flags=documents.is_supervised,
        ) as writer,
        _progress(f"tokenising {documents.name}", documents.total, documents.unit) as advance,
    ):
        _tell(documents.note, writer.note)
        batches = _batches(documents.pieces())
        for batch in itertools.islice(batches, writer.written.parts):
            advance(_amount(batch, documents))
        for batch, ids in encode_batches(tokenizer, batches, workers=workers):
            ended = sum(piece.ends_document for piece in batch)
            writer.extend(ids, num_bytes=sum(piece.num_bytes for piece in batch), documents=ended)
            advance(_amount(batch, documents))
        index = writer.finish()
    _tell(documents.left_out)
    new_bytes = index.num_bytes - writer.written.num_bytes
    return Written(index=index, new_bytes=new_bytes, seconds=time.monotonic() - start)


def _cores() -> int:
    """Cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tell(*notes: str) -> None:
    for note in filter(None, notes):
        print(note, file=cli.enduring(sys.stderr), flush=True)


def _amount(batch: list[Piece], documents: DocumentReader) -> int:
    """How far a batch goes in the source, in the unit of its reader."""
    is_bytes = documents.unit == "bytes"
    return sum(
        (piece.num_bytes if is_bytes else int(piece.ends_document)) if piece.amount is None else piece.amount
        for piece in batch
    )


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
            task = bar.add_task(rich.markup.escape(title), total=total or None)
            yield lambda amount: bar.advance(task, amount)
        return
    done, next_line = 0, time.monotonic() + _PLAIN_SECONDS

    def advance(amount: int) -> None:
        nonlocal done, next_line
        done += amount
        if time.monotonic() >= next_line:
            print(f"{title}: {f'{done / total:.0%} of {total}' if total else done} {unit}", file=stream, flush=True)
            next_line = time.monotonic() + _PLAIN_SECONDS

    print(f"{title}: {total or 'an unknown number of'} {unit}", file=stream, flush=True)
    yield advance


def main(prog: str = "python -m mamba_jax.data.prepare") -> None:
    """The command line.

    Args:
        prog: what it is called by.
    """
    with cli.one_line_errors():
        arguments = cli.parse(arguments_class(PrepareArguments), prog=prog)
        folder = Path(arguments.output)
        refuse_existing(folder)
        tokenizer = make_tokenizer(arguments.tokenizer_config)
        if tokenizer.lossy:
            print("warning:", tokenizer.lossy, file=sys.stderr)
        documents = arguments.source().open()
        assert isinstance(documents, DocumentReader)
        documents.read_for(tokenizer)
        written = write_shards(
            documents, tokenizer, folder, shard_tokens=arguments.shard_tokens, workers=arguments.workers
        )
        index, rate = written.index, written.new_bytes / 1e6 / written.seconds
        size = sum(shard.size for shard in index.shards)
        print(
            f"{folder}: {index.documents:,} documents, {index.num_bytes:,} bytes of text, {index.tokens:,} tokens "
            f"({index.num_bytes / index.tokens:.3f} bytes a token, vocabulary {index.vocab_size:,}), "
            f"{len(index.shards)} shards of {size:,} bytes in all, {written.seconds:.1f} s, {rate:.1f} MB/s"
        )


if __name__ == "__main__":
    main()
