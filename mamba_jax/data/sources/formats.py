"""What a file holds, by its suffixes, and how its bytes are read: plain, gzip or zstd."""

import contextlib
import dataclasses
import gzip
import io
import os
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mamba_jax.errors import InputError, reason

_LINES = frozenset({".jsonl", ".ndjson", ".jsonlines", ".json"})
_TABLES = {".csv": ",", ".tsv": "\t"}
# Suffixes of archives and record formats. Read as plain text, they would train the model on their syntax.
NO_PROSE = frozenset(
    f".{name}"
    for names in (
        ("csv", "db", "json", "jsonl", "jsonlines", "ndjson", "pickle", "pkl", "sqlite", "tsv", "xlsx"),
        ("array_record", "arrow", "avro", "feather", "h5", "hdf5", "orc", "parquet", "tfrecord"),
        ("bin", "npy", "npz", "safetensors"),
        ("7z", "bz2", "gz", "lz4", "rar", "tar", "tgz", "xz", "zip", "zst", "zstd"),
        ("doc", "docx", "epub", "odt", "pdf"),
    )
    for name in names
)
# The buffer of decompressed bytes, so that a short line does not cost a call of the decompressor.
_BUFFER_BYTES = 2**20


Kind = Literal["text", "lines", "parquet"]
Compression = Literal["gzip", "zstd"]
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOnDisk:
    """A file as it was found.

    Attributes:
        path: where it is.
        kind: "text" is one document, "lines" is JSON lines, "parquet" a table.
        compression: how its bytes are packed; None is not at all.
        size: its bytes on disk, by which, with its time, a later change is noticed.
        modified_ns: time of its last change.
    """

    path: Path
    kind: Kind
    compression: Compression | None
    size: int
    modified_ns: int

    def require_unchanged(self) -> None:
        """Raises an `InputError` if the file is no longer the one that was found, or an OSError if it is gone."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise InputError(f"{self.path} was changed while it was read: start again")


def file_on_disk(path: Path) -> FileOnDisk:
    """Finds out what a file is by its suffixes, such as `.jsonl.gz`.

    Raises:
        InputError: it is empty, cannot be looked at, or has a format that is not read; for tables of separated values
            the line tells how to convert it.
    """
    kind, compression = _format(path)
    found = stat_of_content(path, exclude_by="a glob")
    return FileOnDisk(path=path, kind=kind, compression=compression, size=found.st_size, modified_ns=found.st_mtime_ns)


def stat_of_content(path: Path, *, exclude_by: str) -> os.stat_result:
    """Size and time of a file that holds something.

    Args:
        path: the file.
        exclude_by: what would leave it out of the source, for the message.

    Raises:
        InputError: it is empty, or cannot be looked at.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if found.st_size == 0:
        raise InputError(f"{path} is empty: remove it, or exclude it by {exclude_by}")
    return found


def _format(path: Path) -> tuple[Kind, Compression | None]:
    """Kind and compression of a file by its suffixes; refuses those that are not read."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    inner = path.with_suffix("") if compression else path
    suffix = inner.suffix.lower()
    if suffix in _LINES:
        return "lines", compression
    if suffix == ".parquet" and compression is None:
        return "parquet", None
    if suffix in _TABLES:
        raise InputError(f"{path} is a table of separated values, which is not read: {_conversion(path, inner)}")
    if suffix in NO_PROSE:
        raise InputError(
            f"{path} is none of the formats that are read (text, JSON lines, parquet, with .gz or .zst too) by its "
            f"suffix {suffix}: unpack or convert it, or exclude it by a glob"
        )
    return "text", compression


def _conversion(path: Path, inner: Path) -> str:
    """What to do with a table of separated values: a command that writes it as JSON lines."""
    output, separator = inner.with_suffix(".jsonl"), _TABLES[inner.suffix.lower()]
    program = (
        "import csv,json,sys; csv.field_size_limit(2**31); "
        f"[print(json.dumps(row)) for row in csv.DictReader(sys.stdin, delimiter={separator!r})]"
    )
    if path == inner:
        command = f'python -c "{program}" < {shlex.quote(str(path))}'
    else:
        unpack = "gzip" if path.suffix.lower() == ".gz" else "zstd"
        command = f'{unpack} -dc {shlex.quote(str(path))} | python -c "{program}"'
    return f"convert it by `{command} > {shlex.quote(str(output))}`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """The unpacked bytes of a file.

    Attributes:
        file: what they are read from; it can be read forwards only if the file is compressed.
        packed: the file itself, whose position tells how much of it has been read.
    """

    file: io.BufferedReader
    packed: io.BufferedReader


@contextlib.contextmanager
def open_stream(file: FileOnDisk) -> Iterator[Stream]:
    """Context manager: opens a file for reading; yields its unpacked bytes.

    Raises:
        InputError: within the block, the file cannot be read, was changed meanwhile, or its compressed bytes are
            damaged or cut short.
    """
    try:
        with file.path.open("rb") as packed:
            yield Stream(file=_unpacked(packed, file.compression), packed=packed)
        file.require_unchanged()
    except (OSError, EOFError, zlib.error) as error:
        # Of those that are no failed system call, the file itself is the cause.
        if file.compression is None or getattr(error, "errno", None):
            problem = reason(error) if isinstance(error, OSError) else error
            raise InputError(f"cannot read {file.path}: {problem}") from None
        raise InputError(f"{file.path} is damaged or cut short ({error}): fetch or compress it again") from None


def _unpacked(packed: io.BufferedReader, compression: Compression | None) -> io.BufferedReader:
    """The reader of unpacked bytes; of several members or frames in a row it reads all."""
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=packed), _BUFFER_BYTES)
    if compression == "zstd":
        import pyarrow

        raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")
        return io.BufferedReader(raw, _BUFFER_BYTES)
    return packed


def skip(stream: Stream, position: int) -> None:
    """Goes forward to a position, in unpacked bytes, of a stream that has not been read from yet."""
    if stream.file is stream.packed:
        stream.file.seek(position)
        return
    while position > 0 and (block := stream.file.read(min(position, _BUFFER_BYTES))):
        position -= len(block)
