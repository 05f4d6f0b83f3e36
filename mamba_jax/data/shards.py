"""Token shards: a stream of token ids on disk that any window can be read from.

A folder holds ArrayRecord files and `index.json`. The stream is the concatenation of all documents, each followed by
the end-of-document token; it is cut into blocks of `BLOCK_TOKENS` ids, little-endian, one block a record. Only the
last block of the last shard may be shorter.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pydantic
from array_record.python import array_record_module
from jaxtyping import Int

from mamba_jax.errors import InputError

# A window of a usual length touches one or two blocks, and zstd has enough to work with.
BLOCK_TOKENS = 4096
INDEX_NAME = "index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One ArrayRecord file.

    Attributes:
        file: its name.
        records: number of blocks.
        tokens: number of token ids.
        size: bytes on disk.
        sha256: of the file.
    """

    file: str
    records: int
    tokens: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What `index.json` records.

    Attributes:
        version: of this format.
        vocab_size: V; every id is below.
        end_of_document: id that follows every document.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        dtype: of an id, little-endian.
        block_tokens: ids in a record.
        documents: number of documents.
        tokens: number of ids, end-of-document tokens included.
        num_bytes: UTF-8 length of all documents.
        shards: the files in stream order.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    version: Literal[1] = 1
    vocab_size: int
    end_of_document: int
    tokenizer_fingerprint: str
    dtype: Literal["uint16", "uint32"]
    block_tokens: int
    documents: int
    tokens: int
    num_bytes: int
    shards: tuple[ShardEntry, ...]


INDEX_JSON = pydantic.TypeAdapter(ShardIndex)


class TokenDataset:
    """A folder of token shards, open for reading.

    Opening reads the index and compares the size of every file; contents are checked as they are read, by
    ArrayRecord's checksums and against the vocabulary.

    Args:
        folder: holds `index.json`.

    Attributes:
        index: what `index.json` records.

    Raises:
        InputError: the index is missing or damaged, or a shard is missing or has another size.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.index = _read_index(folder)
        for shard in self.index.shards:
            _check_shard(folder / shard.file, shard)
        self._shard_ends = np.cumsum([shard.records for shard in self.index.shards])
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

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
        """What tells this token stream from any other, as a JSON object."""
        files = "".join(shard.sha256 for shard in self.index.shards)
        return {
            "documents": self.index.documents,
            "tokens": self.index.tokens,
            "num_bytes": self.index.num_bytes,
            "tokenizer": self.index.tokenizer_fingerprint,
            "content": hashlib.sha256(files.encode()).hexdigest(),
        }

    def read(self, starts: Int[np.ndarray, " R"], *, length: int) -> Int[np.ndarray, "R W"]:
        """Reads `length` consecutive tokens from each start.

        Args:
            starts: offsets into the stream; start + length must not exceed `num_tokens`.
            length: W.

        Raises:
            InputError: a block fails its checksum or holds an id outside the vocabulary.
        """
        if starts.size == 0:
            return np.empty((0, length), dtype=np.int32)
        size = self.index.block_tokens
        first, last = starts // size, (starts + length - 1) // size
        needed = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        blocks = self._read_blocks(needed)
        rows = np.empty((len(starts), length), dtype=np.int32)
        for row, start, a, b in zip(rows, starts, first, last, strict=True):
            stream = np.concatenate([blocks[block] for block in range(a, b + 1)])
            row[:] = stream[start - a * size : start - a * size + length]
        return rows

    def _read_blocks(self, blocks: Int[np.ndarray, " N"]) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        shards = np.searchsorted(self._shard_ends, blocks, side="right")
        for shard in np.unique(shards).tolist():
            entry = self.index.shards[shard]
            positions = blocks[shards == shard] - (self._shard_ends[shard] - entry.records)
            try:
                records = self._reader(shard).read(positions.tolist())
            except RuntimeError as error:
                raise InputError(f"{self._folder / entry.file} is damaged: {error}; prepare it again") from None
            for block, position, record in zip(blocks[shards == shard], positions, records, strict=True):
                found[int(block)] = self._decode(record, entry, int(position))
        return found

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        if shard not in self._readers:
            path = self._folder / self.index.shards[shard].file
            # Reads are random: reading ahead would only cost.
            reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
            self._readers.setdefault(shard, reader)
        return self._readers[shard]

    def _decode(self, record: bytes, entry: ShardEntry, position: int) -> np.ndarray:
        size, dtype = self.index.block_tokens, np.dtype(self.index.dtype).newbyteorder("<")
        expected = min(size, entry.tokens - position * size)
        path = self._folder / entry.file
        if len(record) != expected * dtype.itemsize:
            raise InputError(
                f"{path}: record {position} holds {len(record)} bytes, the index says {expected} tokens of "
                f"{self.index.dtype}; prepare it again"
            )
        ids = np.frombuffer(record, dtype=dtype)
        if ids.max() >= self.index.vocab_size:
            offset = int(np.argmax(ids >= self.index.vocab_size))
            raise InputError(
                f"{path}: token {position * size + offset} is {ids[offset]}, outside the vocabulary of "
                f"{self.index.vocab_size} ids; prepare it again"
            )
        return ids


def _read_index(folder: Path) -> ShardIndex:
    path = folder / INDEX_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; `python -m mamba_jax.data.prepare` writes token shards"
        ) from None
    try:
        index = INDEX_JSON.validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise InputError(
            f"{path} is no index of token shards: {where + ': ' if where else ''}{detail['msg']}"
        ) from None
    _check_totals(path, index)
    return index


def _check_totals(path: Path, index: ShardIndex) -> None:
    tokens = [shard.tokens for shard in index.shards]
    size = index.block_tokens
    consistent = (
        size > 0
        and min(tokens, default=0) > 0
        and sum(tokens) == index.tokens
        and all(shard.records == -(-shard.tokens // size) for shard in index.shards)
        and all(count % size == 0 for count in tokens[:-1])
        and 0 <= index.end_of_document < index.vocab_size
    )
    if not consistent:
        raise InputError(f"{path} contradicts itself: its shards do not add up; prepare the folder again")
    if index.vocab_size > 2 ** (8 * np.dtype(index.dtype).itemsize):
        raise InputError(
            f"{path} contradicts itself: {index.dtype} cannot hold {index.vocab_size} ids, so large ones have wrapped; "
            "prepare the folder again"
        )
    if index.num_bytes <= 0:
        raise InputError(f"{path} says that its text has {index.num_bytes} bytes: prepare the folder again")


def _check_shard(path: Path, entry: ShardEntry) -> None:
    if not path.is_file():
        raise InputError(f"shard {path} is missing: restore it or prepare the folder again")
    if (size := path.stat().st_size) != entry.size:
        raise InputError(
            f"shard {path} has {size} bytes, its index says {entry.size}: restore it or prepare the folder again"
        )
