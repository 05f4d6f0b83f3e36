"""Writes a token stream to a folder of shards, which appears only when it is complete."""

import hashlib
import os
from pathlib import Path
from types import TracebackType

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int, Shaped

from mamba_jax.data.shard_index import (
    BLOCK_TOKENS,
    FLAGS_VERSION,
    INDEX_VERSION,
    DamagedShards,
    ShardEntry,
    ShardIndex,
    write_index,
)
from mamba_jax.data.shard_progress import Progress, Totals, Workplace
from mamba_jax.data.shards import FLAGGED, block_digest, shard_digests
from mamba_jax.data.vocabulary import Vocabulary
from mamba_jax.errors import InputError
from pallas_kernels.common.rounding import ceil_div

# Token ids in a file unless told otherwise: 256 MiB of 16-bit ids before compression, easy to copy and to check.
SHARD_TOKENS = 2**27
# The digests of all blocks of a file are one record: 2**32 / 4096 blocks * 16 bytes = 16 MiB.
_MAX_SHARD_TOKENS = 2**32
# Ids that are collected before they are checked and written, so that short documents do not cost a call each.
_FLUSH_TOKENS = 256 * BLOCK_TOKENS


class ShardWriter:
    """Writes a folder of token shards; it appears under its name only once it is complete.

    Everything goes to a hidden sibling folder first, which `finish` renames, so that neither a crash nor a second
    writer leaves a folder that looks valid. Use it as a context manager: leaving it before `finish` removes the files.

    With a `key`, the finished shards of a writer that was killed or left stay for the next one of the same key, which
    goes on: the first `written.parts` calls of `extend` are left out, and all later ones are the same again. The result
    is that of a writer that was never interrupted. `add` knows no parts.

    Args:
        folder: the new folder; it must not exist.
        vocabulary: number of ids, end-of-document id and fingerprint, which go into the index.
        shard_tokens: number of ids in a file, rounded up to whole blocks.
        key: identifies the stream, the cut into parts and the size of the shards; None never goes on with anything.
        has_flags: whether `extend` gets arrays of the dtype `FLAGGED`.

    Attributes:
        written: totals of the parts that a writer before this one has written, and that are to be left out.
        note: in a line, what has become of the work of an earlier writer; empty if there is none.

    Raises:
        InputError: `folder` exists or its parent cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        *,
        shard_tokens: int = SHARD_TOKENS,
        key: str | None = None,
        has_flags: bool = False,
    ) -> None:
        if not 0 < shard_tokens <= _MAX_SHARD_TOKENS:
            raise InputError(f"shard_tokens must be positive and at most {_MAX_SHARD_TOKENS}, got {shard_tokens}")
        refuse_existing(folder)
        self.written, self.note = Totals(), ""
        self._folder = folder
        self._key = key
        self._vocabulary, self._has_flags = vocabulary, has_flags
        self._dtype = np.dtype("<u2" if vocabulary.size <= 2**16 else "<u4")
        self._shard_blocks = ceil_div(shard_tokens, BLOCK_TOKENS)
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        # Before the part that is being added, and with it.
        self._before = self._totals = Totals()
        self._tokens = self._skipped = 0
        self._shards: list[ShardEntry] = []
        self._content = hashlib.sha256()
        self._file: array_record_module.ArrayRecordWriter | None = None
        self._file_digests: list[bytes] = []
        self._file_tokens = 0

    def __enter__(self) -> "ShardWriter":
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._place = Workplace(self._folder, self._key)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise InputError(f"cannot create token shards in {self._folder.parent}: {reason}") from None
        try:
            self._go_on(self._place.progress())
        except DamagedShards as error:
            self.note = f"the unfinished shards are damaged, and all are made anew: {error}"
        except InputError:
            self._place.leave(keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Where another writer has finished first, nobody will need what there is.
        self._place.leave(keep=bool(self._shards) and not os.path.lexists(self._folder))

    def _go_on(self, progress: Progress) -> None:
        """Takes over the shards that another writer has finished; nothing if one of them is damaged."""
        digests = [shard_digests(self._place.path / shard.file, shard) for shard in progress.shards]
        if not digests:
            return
        self._shards = list(progress.shards)
        self._content.update(b"".join(digests))
        self._tokens = sum(shard.tokens for shard in self._shards)
        self.written = self._totals = progress.before
        self._skipped = self._tokens - progress.before.tokens
        self.note = f"going on behind {len(digests)} finished shards ({self._tokens:,} tokens)"

    def add(self, ids: Int[np.ndarray, " T"], *, num_bytes: int, ends_document: bool) -> None:
        """Appends a document, or a part of one.

        Args:
            ids: token ids of the text.
            num_bytes: UTF-8 length of the text.
            ends_document: whether the document ends here, so that the end-of-document token follows.

        Raises:
            InputError: an id lies outside the vocabulary or is not a whole number, or the disk is full.
        """
        if ids.dtype.kind not in "iu":
            raise InputError(f"token ids must be whole numbers, got {ids.dtype}: convert them")
        # numpy would concatenate int64 and uint64 ids to floats.
        parts = [ids.astype(np.int64, copy=False)]
        if ends_document:
            parts.append(np.array([self._vocabulary.end_of_document], dtype=np.int64))
        self._append(parts, num_bytes=num_bytes, documents=int(ends_document))
        if self._pending_tokens >= _FLUSH_TOKENS:
            self._flush(last=False)

    def extend(self, ids: Shaped[np.ndarray, " T"], *, num_bytes: int, documents: int) -> None:
        """Appends a part of the stream in which the end-of-document tokens stand already, and writes what it fills.

        Args:
            ids: token ids, of one dtype in all calls; with flags, of the dtype `FLAGGED`.
            num_bytes: UTF-8 length of the text.
            documents: number of documents that end in it.

        Raises:
            InputError: see `add`.
        """
        self._before = self._totals
        self._append([ids], num_bytes=num_bytes, documents=documents)
        if self._skipped:
            self._pending, self._pending_tokens = [ids[self._skipped :]], len(ids) - self._skipped
            self._skipped = 0
        self._flush(last=False)

    def _append(self, parts: list[np.ndarray], *, num_bytes: int, documents: int) -> None:
        tokens = sum(map(len, parts))
        self._pending += parts
        self._pending_tokens += tokens
        self._totals = self._totals.plus(documents=documents, num_bytes=num_bytes, tokens=tokens)

    def finish(self) -> ShardIndex:
        """Completes the last shard, writes the index and gives the folder its name.

        Raises:
            InputError: nothing was added, the disk is full, or the folder has come to exist meanwhile.
        """
        self._flush(last=True)
        if self._tokens == 0:
            raise InputError(f"no text to write to {self._folder}")
        index = ShardIndex(
            version=FLAGS_VERSION if self._has_flags else INDEX_VERSION,
            vocab_size=self._vocabulary.size,
            end_of_document=self._vocabulary.end_of_document,
            tokenizer_fingerprint=self._vocabulary.fingerprint,
            dtype="uint16" if self._dtype.itemsize == 2 else "uint32",
            block_tokens=BLOCK_TOKENS,
            documents=self._totals.documents,
            tokens=self._tokens,
            num_bytes=self._totals.num_bytes,
            shards=tuple(self._shards),
            content=self._content.hexdigest(),
        )
        try:
            index = write_index(self._place.path, index)
        except OSError as error:
            raise InputError(f"cannot write the index of {self._folder}: {error.strerror}") from None
        refuse_existing(self._folder)
        try:
            self._place.rename(self._folder)
        except OSError as error:
            raise InputError(f"cannot rename the finished shards to {self._folder}: {error.strerror}") from None
        return index

    def _flush(self, *, last: bool) -> None:
        """Checks pending ids and writes all whole blocks of them; `last` writes the rest too, and ends the file."""
        empty = np.empty(0, FLAGGED if self._has_flags else np.int64)
        tokens = np.concatenate(self._pending) if self._pending else empty
        ids = tokens["id"] if self._has_flags else tokens
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocabulary.size:
            bad = np.flatnonzero((ids < 0) | (ids >= self._vocabulary.size))
            raise InputError(
                f"token {self._tokens + bad[0]} of the stream is {ids[bad[0]]}, outside the vocabulary of "
                f"{self._vocabulary.size} ids"
            )
        whole = len(ids) if last else len(ids) // BLOCK_TOKENS * BLOCK_TOKENS
        self._pending, self._pending_tokens = [tokens[whole:]], len(ids) - whole
        data = ids[:whole].astype(self._dtype)
        for start in range(0, whole, BLOCK_TOKENS):
            end = min(whole, start + BLOCK_TOKENS)
            flags = tokens["flags"][start:end].tobytes() if self._has_flags else b""
            self._write_block(data[start:end].tobytes() + flags, end - start)
        if last:
            self._close_shard()

    def _write_block(self, data: bytes, tokens: int) -> None:
        """Writes up to `BLOCK_TOKENS` tokens as one record, and ends the file if that fills it."""
        try:
            if self._file is None:
                path = os.fsencode(self._shard_path())
                self._file = array_record_module.ArrayRecordWriter(path, "group_size:1,zstd:3")
            self._file.write(data)
        except RuntimeError as error:
            raise self._write_error(error) from None
        digest = block_digest(data)
        self._content.update(digest)
        self._file_digests.append(digest)
        self._file_tokens += tokens
        self._tokens += tokens
        if len(self._file_digests) == self._shard_blocks:
            self._close_shard()
            self._keep()

    def _close_shard(self) -> None:
        """Ends the open file, if any, with a record of its blocks' digests, and makes its entry for the index."""
        if self._file is None:
            return
        path, digests = self._shard_path(), b"".join(self._file_digests)
        try:
            self._file.write(digests)
            self._file.close()
            size = path.stat().st_size
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (RuntimeError, OSError) as error:
            raise self._write_error(error) from None
        self._shards.append(
            ShardEntry(
                file=path.name,
                records=len(self._file_digests),
                tokens=self._file_tokens,
                size=size,
                sha256=digest,
                digests=hashlib.sha256(digests).hexdigest(),
            )
        )
        self._file, self._file_digests, self._file_tokens = None, [], 0

    def _keep(self) -> None:
        try:
            self._place.keep(Progress(shards=tuple(self._shards), before=self._before))
        except OSError as error:
            raise InputError(f"cannot write what is finished of {self._folder}: {error.strerror}") from None

    def _shard_path(self) -> Path:
        return self._place.path / f"tokens-{len(self._shards):05d}.array_record"

    def _write_error(self, error: RuntimeError | OSError) -> InputError:
        return InputError(f"cannot write shard {self._shard_path().name} of {self._folder}: {error}")


def refuse_existing(folder: Path) -> None:
    """Raises an `InputError` if there is anything at `folder`; nothing is ever overwritten."""
    # A link to nothing counts as well. `new/..` would come into existence together with `new`.
    if folder.name == ".." or os.path.lexists(folder):
        raise InputError(f"{folder} exists already: choose another folder or remove it")
