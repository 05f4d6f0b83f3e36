"""The index of a folder of token shards (`index.json`): its fields, reading, writing, and checks of the index alone."""

import dataclasses
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from pallas_kernels.common.rounding import ceil_div

# Token ids in a block, the unit of reading and compression. A window of up to 4096 tokens touches one or two blocks,
# and a block of 8 KiB or more compresses well.
BLOCK_TOKENS = 4096
INDEX_NAME = "index.json"
INDEX_VERSION, FLAGS_VERSION = 2, 3
# An index of 100,000 shards takes 20 MB; ten times that is not an index of ours.
_MAX_INDEX_BYTES = 2**28
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")

# JSON numbers have no limit. Up to 2**53, whole numbers are exact in every JSON reader, and sums of them fit into
# int64.
_Count = Annotated[int, pydantic.Field(ge=0, le=2**53)]
_Sha256 = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class DamagedShards(InputError):
    """The files are not the token shards that were written; not raised for storage that cannot be read now."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One ArrayRecord file.

    Attributes:
        file: name of the file.
        records: number of blocks in it.
        tokens: number of token ids in it.
        size: its size on disk, in bytes.
        sha256: sha256 of the file.
        digests: sha256 of its last record, which holds a digest of each block; None in version 1, which has no digests.
    """

    file: str
    records: _Count
    tokens: _Count
    size: _Count
    sha256: _Sha256
    digests: _Sha256 | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The content of `index.json`.

    Attributes:
        version: version of the format; 3 has flags of each token, which 2 has not. Version 1 can still be read.
        vocab_size: V; token ids are 0 .. V - 1.
        end_of_document: id that follows every document.
        tokenizer_fingerprint: fingerprint of the tokenizer that made the ids.
        dtype: dtype in which ids are stored, little-endian.
        block_tokens: number of ids in a record.
        documents: number of documents.
        tokens: number of ids, end-of-document tokens included.
        num_bytes: UTF-8 length of all documents.
        shards: the files, in the order of the stream.
        content: sha256 of the digests of all blocks, which identifies the token stream; None in version 1.
        checksum: sha256 of all other fields, see `index_checksum`; None in version 1.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    version: Literal[1, 2, 3] = INDEX_VERSION
    vocab_size: _Count
    end_of_document: _Count
    tokenizer_fingerprint: str
    dtype: Literal["uint16", "uint32"]
    block_tokens: _Count
    documents: _Count
    tokens: _Count
    num_bytes: _Count
    shards: tuple[ShardEntry, ...]
    content: _Sha256 | None = None
    checksum: _Sha256 | None = None

    @property
    def has_flags(self) -> bool:
        """Whether the shards say of each token if it counts in the loss."""
        return self.version == FLAGS_VERSION


INDEX_JSON = pydantic.TypeAdapter(ShardIndex)


def index_checksum(index: ShardIndex) -> str:
    """Sha256 of the index as JSON without its checksum, with sorted keys and without spaces."""
    fields: dict[str, Any] = INDEX_JSON.dump_python(index, mode="json")
    del fields["checksum"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_index(folder: Path, index: ShardIndex) -> ShardIndex:
    """Writes `index.json` with its checksum.

    Returns:
        The index as written.

    Raises:
        OSError: the file cannot be written.
    """
    index = dataclasses.replace(index, checksum=index_checksum(index))
    (folder / INDEX_NAME).write_bytes(INDEX_JSON.dump_json(index, indent=2) + b"\n")
    return index


def read_index(folder: Path) -> ShardIndex:
    """Reads `index.json` and checks that its fields agree with each other and with its checksum.

    Raises:
        InputError: it cannot be read now.
        DamagedShards: it is missing, is not an index, or contradicts itself.
    """
    path = folder / INDEX_NAME
    try:
        index = INDEX_JSON.validate_json(_read(path), strict=True)
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise DamagedShards(
            f"{path} is not an index of token shards: {where + ': ' if where else ''}{detail['msg']}"
        ) from None
    if contradiction := _contradiction(index):
        raise DamagedShards(f"{path} contradicts itself: {contradiction}; prepare the folder again")
    return index


def _read(path: Path) -> bytes:
    """Reads the index file, but nothing that is too large for an index or is not a regular file."""
    advice = "`python -m mamba_jax.data.prepare` writes token shards"
    try:
        # Opening a pipe of this name would otherwise wait for someone to write to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(_MAX_INDEX_BYTES + 1) if regular else b""
    except FileNotFoundError as error:
        raise DamagedShards(f"cannot read {path}: {error.strerror}; {advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', error)}; {advice}") from None
    if not regular or len(data) > _MAX_INDEX_BYTES:
        raise DamagedShards(f"{path} is not a regular file of at most {_MAX_INDEX_BYTES} bytes; {advice}")
    return data


def _contradiction(index: ShardIndex) -> str | None:
    """Says in a few words why the fields cannot all be true; None if they can."""
    size, shards = index.block_tokens, index.shards
    for shard in shards:
        if not _PLAIN_NAME.fullmatch(shard.file):
            return f"a shard must have a plain file name, not {shard.file!r}"
        # Every record takes at least 40 bytes, so there are fewer records than bytes.
        if not 0 < shard.records <= shard.size or size == 0 or shard.records != ceil_div(shard.tokens, size):
            return f"{shard.file} cannot hold {shard.tokens} tokens in {shard.records} records of {size}"
    whole = all(shard.tokens % size == 0 for shard in shards[:-1])
    if not shards or not whole or sum(shard.tokens for shard in shards) != index.tokens:
        return "its shards do not add up"
    if len({shard.file for shard in shards}) < len(shards):
        return "it names a shard twice"
    if index.end_of_document >= index.vocab_size:
        return f"the end-of-document id {index.end_of_document} is outside the vocabulary of {index.vocab_size} ids"
    if index.vocab_size > 2 ** (8 * np.dtype(index.dtype).itemsize):
        return f"{index.dtype} cannot hold {index.vocab_size} ids, so large ones have wrapped"
    if index.documents > index.tokens:
        return f"{index.tokens} tokens cannot be {index.documents} documents"
    bytes_are_tokens = index.tokenizer_fingerprint == ByteTokenizer.fingerprint
    if index.num_bytes == 0 or (bytes_are_tokens and index.num_bytes != index.tokens - index.documents):
        return f"{index.num_bytes} bytes of text cannot be {index.tokens} tokens of {index.documents} documents"
    since_version_2 = [index.content, index.checksum, *(shard.digests for shard in shards)]
    if index.version == 1:
        return "version 1 has no content, checksum and digests" if any(since_version_2) else None
    if None in since_version_2 or index.checksum != index_checksum(index):
        return "it was changed after it was written (its checksum tells)"
    return None if size == BLOCK_TOKENS else f"blocks of version {index.version} have {BLOCK_TOKENS} tokens, not {size}"
