"""From batches of documents to the token stream: in this process, or by several that work ahead."""

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Shaped

from mamba_jax.data.documents import Piece
from mamba_jax.data.shards import COUNTS, ENDS, FLAGGED
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError

# Batches that are handed to processes ahead of the one that is waited for, for each process: one that it works on, and
# one that it finds when it is done.
_AHEAD = 2
# Text that is tokenised here before processes are started: they take two seconds to start.
_ALONE_BYTES = 16 * 2**20
_ROOT = Path(__file__).resolve().parents[3]

# A batch and its ids.
Encoded = tuple[list[Piece], Shaped[np.ndarray, " T"]]


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Shaped[np.ndarray, " T"]:
    """The part of the token stream that pieces make: their ids, and the end-of-document id behind each document.

    Returns:
        The ids; if the pieces say what counts, of the dtype `FLAGGED`, and a document that ends in its end-of-document
        id already gets no other.

    Raises:
        InputError: see `Tokenizer.encode_batch`.
    """
    if pieces and pieces[0].counts is not None:
        return np.concatenate([_flagged(tokenizer, piece) for piece in pieces])
    found = tokenizer.encode_batch([piece.text for piece in pieces], continues=[piece.continues for piece in pieces])
    end = np.array([tokenizer.end_of_document], np.int32)
    parts = [part for piece, ids in zip(pieces, found, strict=True) for part in ([ids, end][: 1 + piece.ends_document])]
    return np.concatenate([np.empty(0, np.int32), *parts])


def _flagged(tokenizer: Tokenizer, piece: Piece) -> np.ndarray:
    """The ids of a piece, each with its flags."""
    if piece.has_markup:
        ids = tokenizer.encode_markup(piece.text, continues=piece.continues)
    else:
        ids = tokenizer.encode_batch([piece.text], continues=[piece.continues])[0]
    if piece.ends_document and ids[-1:] != [tokenizer.end_of_document]:
        ids = np.append(ids, tokenizer.end_of_document)
    flagged = np.zeros(len(ids), FLAGGED)
    flagged["id"], flagged["flags"] = ids, COUNTS * bool(piece.counts)
    if piece.ends_document:
        flagged["flags"][-1] |= ENDS
    return flagged


def encode_batches(tokenizer: Tokenizer, batches: Iterable[list[Piece]], *, workers: int) -> Iterator[Encoded]:
    """The ids of batches, in their order.

    Args:
        tokenizer: makes the ids.
        batches: pieces, in order; with several processes they are read a few batches ahead.
        workers: number of processes; 1 is this one alone. Of a short text, or where processes would not help, this one
            does it all.

    Raises:
        InputError: see `Tokenizer.encode_batch`; or a process ended, as one does that the system kills for its memory.
    """
    batches, alone = iter(batches), 0
    parallel = workers > 1 and tokenizer.runs_in_workers
    while (batch := next(batches, None)) is not None:
        yield batch, encode_pieces(tokenizer, batch)
        alone += sum(piece.num_bytes for piece in batch)
        if parallel and alone >= _ALONE_BYTES:
            with _Workers(tokenizer, workers) as pool:
                yield from pool.encode(batches)
            return


class _Workers:
    """Processes that tokenise, each fed by a thread of its own through pipes.

    They end when their standard input does, so that none is left if this process is killed. They are programs of their
    own and not copies of this one, which may hold devices and threads, or be a script that must not run twice.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(count)

    def __enter__(self) -> "_Workers":
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        try:
            for _ in range(self._count):
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "mamba_jax.data.tokenization.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    # Ctrl-C is for the program, which then ends them.
                    process_group=0,
                )
                self._processes.append(process)
                self._threads.submit(self._start, process)
        except OSError as error:
            self.__exit__()
            raise InputError(
                f"cannot start {self._count} processes that tokenise ({error.strerror}): use fewer --workers"
            ) from None
        return self

    def _start(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        # Of a process that has ended, the first one that asks it for something learns.
        with contextlib.suppress(OSError):
            send(process.stdin, self._tokenizer)
        self._idle.put(process)

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.communicate()

    def encode(self, batches: Iterable[list[Piece]]) -> Iterator[Encoded]:
        """See `encode_batches`."""
        waiting: collections.deque[tuple[list[Piece], concurrent.futures.Future[Any]]] = collections.deque()
        for batch in batches:
            waiting.append((batch, self._threads.submit(self._ask, batch)))
            if len(waiting) >= _AHEAD * self._count:
                done, ids = waiting.popleft()
                yield done, ids.result()
        while waiting:
            done, ids = waiting.popleft()
            yield done, ids.result()

    def _ask(self, batch: list[Piece]) -> Shaped[np.ndarray, " T"]:
        """Has a process that is idle tokenise a batch."""
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            send(process.stdin, batch)
            answer = receive(process.stdout)
        except (OSError, EOFError):
            status = process.wait()
            raise InputError(
                f"a process that tokenises ended with status {status}: if the system lacked memory, use fewer --workers"
            ) from None
        finally:
            # One that has ended goes back, too: whoever waits for it learns the same.
            self._idle.put(process)
        if isinstance(answer, InputError):
            raise answer
        return answer


def send(stream: IO[bytes], value: Any) -> None:
    """Writes a message to a pipe between this program and its own processes; an OSError says that nobody reads."""
    message = pickle.dumps(value)
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next message of such a pipe.

    Raises:
        EOFError: the other side has ended.
    """
    size = int.from_bytes(stream.read(8), "little")
    data = stream.read(size)
    if not size or len(data) < size:
        raise EOFError
    return pickle.loads(data)
