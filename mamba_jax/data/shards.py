"""Token shards: a stream of token ids on disk that any window can be read from.

A folder holds ArrayRecord files and `index.json`. The stream is the concatenation of all documents, each followed by
the end-of-document token; it is cut into blocks of `BLOCK_TOKENS` ids, little-endian, one block a record. Only the
last block of the last shard may be shorter. One more record of each file holds the digests of its blocks.

Where not all tokens count in the loss (version 3), the ids of a block are followed by a byte of flags for each of them.
"""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int, UInt8

from mamba_jax.data.shard_index import INDEX_NAME, DamagedShards, ShardEntry, read_index
from mamba_jax.data.vocabulary import Vocabulary
from mamba_jax.errors import InputError

# 16 bytes: finding two blocks with the same digest would take about 2**64 trials.
_DIGEST_BYTES = 16

# Flags of a token: it counts in the loss as a target, and its document ends with it.
COUNTS, ENDS = 1, 2
# A token of a stream with flags, in memory.
FLAGGED = np.dtype([("id", np.int32), ("flags", np.uint8)])


def block_digest(block: bytes) -> bytes:
    """The digest that a shard stores for each of its blocks: the first half of the block's sha256."""
    return hashlib.sha256(block).digest()[:_DIGEST_BYTES]


def shard_digests(path: Path, entry: ShardEntry) -> bytes:
    """The digests of a shard's blocks, one after the other, once all of the file has been compared with its entry.

    Raises:
        InputError: the file cannot be read.
        DamagedShards: it is missing or not the file that was written.
    """
    _check_file(path, entry)
    _require_sha256(path, entry)
    return _open(path, entry).digests


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OpenShard:
    """A file that is open for reading, and the digests of its blocks; empty in version 1, where there are none."""

    reader: array_record_module.ArrayRecordReader
    digests: bytes


class TokenDataset:
    """A folder of token shards, open for reading.

    Opening checks the index and the size of every file. Contents are checked only as they are read, so that opening
    terabytes takes no longer than opening megabytes: when a file is first read, its record of block digests (about a
    five-hundredth of the file) is compared with the sha256 in the index, and after that every block that is read is
    compared with its digest. A damaged, edited or exchanged file is thus noticed at the first wrong block. Version 1 of
    the format has no digests; there the sha256 of the whole file is compared when the file is first read.

    Args:
        folder: the folder that holds `index.json`.

    Attributes:
        index: what `index.json` records.

    Raises:
        InputError: the folder cannot be read.
        DamagedShards: the index is missing or wrong, or a shard is missing or has another size.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.index = read_index(folder)
        for shard in self.index.shards:
            _check_file(folder / shard.file, shard)
        self._shard_ends = np.cumsum([shard.records for shard in self.index.shards])
        self._open_shards: dict[int, _OpenShard] = {}
        self._opening = threading.Lock()

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, end-of-document tokens included."""
        return self.index.tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 length of all documents; bits per byte is (nats per token) * num_tokens / num_bytes / ln 2."""
        return self.index.num_bytes

    @property
    def num_documents(self) -> int:
        """Documents of the stream."""
        return self.index.documents

    @property
    def end_of_document(self) -> int:
        """Id that follows every document."""
        return self.index.end_of_document

    @property
    def identity(self) -> dict[str, int | str]:
        """What tells this token stream from any other, as a JSON object.

        The same text and tokenizer give the same identity wherever and whenever they were prepared, whatever the size
        and names of the shards; the key "content" is a sha256 of the ids. Shards of version 1 do not know it: there it
        comes from the sha256 of the files.
        """
        files = "".join(shard.sha256 for shard in self.index.shards)
        return {
            "documents": self.index.documents,
            "tokens": self.index.tokens,
            "num_bytes": self.index.num_bytes,
            "tokenizer": self.index.tokenizer_fingerprint,
            "content": self.index.content or hashlib.sha256(files.encode()).hexdigest(),
        }

    @property
    def tokens_per_byte(self) -> float:
        """Tokens for each UTF-8 byte of the documents, end-of-document tokens included."""
        return self.num_tokens / self.num_bytes

    def require_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Makes sure that the ids are those of `vocabulary`.

        Raises:
            InputError: its fingerprint, its size or its end of document is another one.
        """
        index = self.index
        if index.tokenizer_fingerprint != vocabulary.fingerprint:
            raise InputError(
                f"{self._folder} was made by another tokenizer (vocabulary {index.vocab_size}, here "
                f"{vocabulary.size}): set data.tokenizer to that one or prepare the text again"
            )
        if (index.vocab_size, index.end_of_document) != (vocabulary.size, vocabulary.end_of_document):
            raise DamagedShards(
                f"{self._folder / INDEX_NAME} says vocabulary {index.vocab_size} and end of document "
                f"{index.end_of_document}, its tokenizer {vocabulary.size} and {vocabulary.end_of_document}: "
                "prepare the folder again"
            )

    def check(self) -> None:
        """Compares every file, and so every token, with what the index records, without decoding the tokens.

        Raises:
            InputError: a file cannot be read.
            DamagedShards: something is not what was written.
        """
        for shard in self.index.shards:
            _require_sha256(self._folder / shard.file, shard)
        content = hashlib.sha256(b"".join(self._open(i).digests for i in range(len(self.index.shards)))).hexdigest()
        if self.index.content not in (None, content):
            raise DamagedShards(f"{self._folder} holds another token stream than its index says")

    def read(self, starts: Int[np.ndarray, " R"], *, length: int) -> Int[np.ndarray, "R W"]:
        """Reads `length` consecutive tokens from each start.

        Args:
            starts: offsets into the stream; start + length must not exceed `num_tokens`.
            length: W.

        Raises:
            InputError: a file cannot be read.
            DamagedShards: a block is not the one that was written, or holds an id outside the vocabulary.
        """
        rows = self._rows(starts, length)
        return rows["id"] if rows.dtype == FLAGGED else rows

    def read_flagged(
        self, starts: Int[np.ndarray, " R"], *, length: int
    ) -> tuple[Int[np.ndarray, "R W"], UInt8[np.ndarray, "R W"]]:
        """The same with the flags `COUNTS` and `ENDS` of each token; without flags on disk, all count."""
        rows = self._rows(starts, length)
        if rows.dtype == FLAGGED:
            return rows["id"], rows["flags"]
        return rows, (COUNTS | np.where(rows == self.end_of_document, ENDS, 0)).astype(np.uint8)

    def _rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens from each start on, as ids or, with flags on disk, as `FLAGGED`."""
        dtype = FLAGGED if self.index.has_flags else np.dtype(np.int32)
        if starts.size == 0:
            return np.empty((0, length), dtype=dtype)
        size = self.index.block_tokens
        first, last = starts // size, (starts + length - 1) // size
        needed = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        blocks = self._read_blocks(needed)
        rows = np.empty((len(starts), length), dtype=dtype)
        for row, start, a, b in zip(rows, starts, first, last, strict=True):
            stream = np.concatenate([blocks[block] for block in range(a, b + 1)])
            row[:] = stream[start - a * size : start - a * size + length]
        return rows

    def _read_blocks(self, blocks: Int[np.ndarray, " N"]) -> dict[int, np.ndarray]:
        """Reads and checks blocks, numbered over all shards in order; returns the ids of each by its number."""
        found: dict[int, np.ndarray] = {}
        shards = np.searchsorted(self._shard_ends, blocks, side="right")
        for shard in np.unique(shards).tolist():
            entry, file = self.index.shards[shard], self._open(shard)
            positions = blocks[shards == shard] - (self._shard_ends[shard] - entry.records)
            records = _read_records(self._folder / entry.file, file.reader, positions.tolist())
            for block, position, record in zip(blocks[shards == shard], positions.tolist(), records, strict=True):
                found[int(block)] = self._decode(record, entry, file, position)
        return found

    def _open(self, shard: int) -> _OpenShard:
        with self._opening:
            if shard not in self._open_shards:
                entry = self.index.shards[shard]
                read = _open_version_1 if self.index.version == 1 else _open
                self._open_shards[shard] = read(self._folder / entry.file, entry)
            return self._open_shards[shard]

    def _decode(self, record: bytes, entry: ShardEntry, file: _OpenShard, position: int) -> np.ndarray:
        """Tokens of the block in record `position` of a shard; checks number, range and the block's digest."""
        size, dtype = self.index.block_tokens, np.dtype(self.index.dtype).newbyteorder("<")
        expected = min(size, entry.tokens - position * size)
        path = self._folder / entry.file
        if len(record) != expected * (dtype.itemsize + self.index.has_flags):
            raise DamagedShards(
                f"{path}: record {position} holds {len(record)} bytes, the index says {expected} tokens of "
                f"{self.index.dtype}; prepare it again"
            )
        ids = np.frombuffer(record, dtype=dtype, count=expected)
        if ids.max() >= self.index.vocab_size:
            offset = int(np.argmax(ids >= self.index.vocab_size))
            raise DamagedShards(
                f"{path}: token {position * size + offset} is {ids[offset]}, outside the vocabulary of "
                f"{self.index.vocab_size} ids; prepare it again"
            )
        if file.digests and block_digest(record) != file.digests[_DIGEST_BYTES * position :][:_DIGEST_BYTES]:
            raise DamagedShards(f"{path}: record {position} is not the one that was written; prepare it again")
        if not self.index.has_flags:
            return ids
        flagged = np.empty(expected, FLAGGED)
        flagged["id"], flagged["flags"] = ids, np.frombuffer(record, dtype=np.uint8, offset=expected * dtype.itemsize)
        return flagged


def _check_file(path: Path, entry: ShardEntry) -> None:
    """Makes sure that a shard's file exists and has the size that the index tells."""
    try:
        if not path.is_file():
            raise DamagedShards(f"shard {path} is missing or no file: restore it or prepare the folder again")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read shard {path}: {error.strerror}") from None
    if size != entry.size:
        raise DamagedShards(
            f"shard {path} has {size} bytes, its index says {entry.size}: restore it or prepare the folder again"
        )


def _open(path: Path, entry: ShardEntry) -> _OpenShard:
    reader = _reader(path)
    (digests,) = _read_records(path, reader, [entry.records])
    if hashlib.sha256(digests).hexdigest() != entry.digests or len(digests) != _DIGEST_BYTES * entry.records:
        raise _another_file(path)
    return _OpenShard(reader=reader, digests=digests)


def _open_version_1(path: Path, entry: ShardEntry) -> _OpenShard:
    _require_sha256(path, entry)
    return _OpenShard(reader=_reader(path), digests=b"")


def _require_sha256(path: Path, entry: ShardEntry) -> None:
    digest = hashlib.sha256()
    for chunk in _file_chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != entry.sha256:
        raise _another_file(path)


def _another_file(path: Path) -> DamagedShards:
    return DamagedShards(
        f"shard {path} is not the file that its index names, by its sha256: restore it or prepare the folder again"
    )


def _reader(path: Path) -> array_record_module.ArrayRecordReader:
    try:
        # ArrayRecord takes a file that it cannot open for an empty one.
        with path.open("rb"):
            # Reads are random: reading ahead would only cost.
            return array_record_module.ArrayRecordReader(os.fsencode(path), "readahead_buffer_size:0")
    except OSError as error:
        raise InputError(f"cannot read shard {path}: {error.strerror}") from None


def _read_records(path: Path, reader: array_record_module.ArrayRecordReader, positions: list[int]) -> list[bytes]:
    try:
        return reader.read(positions)
    except RuntimeError as error:
        # The library says in words only whether the bytes are wrong or cannot be had at present.
        for _ in _file_chunks(path):
            pass
        raise DamagedShards(f"{path} is damaged: {error}; prepare it again") from None


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                yield chunk
    except OSError as error:
        raise InputError(f"cannot read shard {path}: {error.strerror}") from None
