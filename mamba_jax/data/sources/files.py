"""The source "files": text, JSON lines and parquet, packed or not, in a file, a folder or what a glob matches."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_jax.data.config import FilesSource
from mamba_jax.data.documents import DocumentReader, Piece
from mamba_jax.data.sources.formats import FileOnDisk, file_on_disk, open_stream, skip
from mamba_jax.data.sources.held_out import line_cut, take_part, text_cut
from mamba_jax.data.sources.json_lines import MAX_LINE, line_lengths, line_texts
from mamba_jax.data.sources.left_out import LeftOut
from mamba_jax.data.sources.parquet import check_tables, row_texts
from mamba_jax.data.sources.supervised import SupervisedRecord, document_pieces, record_reader
from mamba_jax.data.sources.text_files import find_files
from mamba_jax.data.sources.text_pieces import PIECE_BYTES, decoded_pieces
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError, reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """A file, or a span of one.

    Attributes:
        disk: the file.
        rows: rows of a table; 0 for others.
        span: unpacked bytes, or rows of a table; None as end is the end of the file.
    """

    disk: FileOnDisk
    rows: int = 0
    span: tuple[int, int | None] = (0, None)

    @property
    def amount(self) -> int:
        """Bytes on disk that are to be read for the span."""
        start, end = self.span
        if self.disk.compression is not None:
            return self.disk.size
        if self.rows:
            return self.disk.size * ((self.rows if end is None else end) - start) // self.rows
        return (self.disk.size if end is None else end) - start

    @property
    def identity(self) -> list[Any]:
        """What changes when the file or the span does, as a JSON value."""
        return [str(self.disk.path), self.disk.size, self.disk.modified_ns, *self.span]


class Files(DocumentReader):
    """Documents of files, sorted by name; of each file in its order.

    A hash of its name decides whether a file is held out. If this leaves one of the two parts empty (as with a single
    file), every file is cut in two instead, and its end is held out: the last bytes of a text, the lines that begin
    there, or the last rows of a table.
    """

    unit = "bytes"

    def __init__(self, source: FilesSource) -> None:
        self._source = source
        self._text_of = record_reader(source)
        self._left_out = LeftOut(skip_bad=source.skip_bad, deduplicate=source.deduplicate)
        # Documents of the present pass, and bytes on disk that were read for the present file.
        self._documents = self._read = 0
        self.name = source.path
        root, names = _found(source.path)
        files = {name: _File(disk=file_on_disk(root / name)) for name in names}
        self.is_supervised = source.records == "supervised"
        text = next((file.disk.path for file in files.values() if file.disk.kind == "text"), None)
        if self.is_supervised and text is not None:
            raise InputError(
                f"{text} is text, and records='supervised' reads JSON lines and parquet: exclude it by a glob"
            )
        tables = {name: file.disk.path for name, file in files.items() if file.disk.kind == "parquet"}
        for name, rows in zip(tables, check_tables(list(tables.values()), self._text_of), strict=True):
            files[name] = dataclasses.replace(files[name], rows=rows)
        fraction = source.validation_fraction
        part = take_part(files, source.part, fraction, cut=self._cut_in_two, place=self.name)
        self._files = part.files
        if part.is_cut:
            of_what = "the file" if len(files) == 1 else f"each of the {len(files)} files"
            self.note = f"{self.name}: held out is the end of {of_what}, its last {100 * fraction:g} %"
        self.total = sum(file.amount for file in self._files)
        self.identity = {
            "source": dataclasses.asdict(source),
            "root": str(root.resolve()),
            "files": [file.identity for file in self._files],
        }

    def _cut_in_two(self, file: _File) -> tuple[_File | None, _File | None]:
        """The spans of a file to train on and to hold out, each None if it is empty."""
        position, size = self._cut_position(file)
        if not 0 < position < size:
            return dataclasses.replace(file), None
        return dataclasses.replace(file, span=(0, position)), dataclasses.replace(file, span=(position, None))

    def _cut_position(self, file: _File) -> tuple[int, int]:
        """Where the held-out end of a file begins, and the size of the file, in the unit of its span."""
        fraction, disk = self._source.validation_fraction, file.disk
        if disk.kind == "parquet":
            return file.rows - max(1, round(file.rows * fraction)), file.rows

        def read(start: int, length: int) -> bytes:
            with open_stream(disk) as stream:
                skip(stream, start)
                return stream.file.read(length)

        size = disk.size
        if disk.compression is not None:
            with open_stream(disk) as stream:
                size = sum(map(len, iter(functools.partial(stream.file.read, PIECE_BYTES), b"")))
        if disk.kind == "text":
            return text_cut(read, size, fraction), size
        with open_stream(disk) as stream:
            start = 0 if disk.compression else max(0, size - round(size * fraction) - MAX_LINE)
            skip(stream, start)
            if start:
                start += len(stream.file.readline())
            return line_cut(line_lengths(stream.file), size, fraction, start=start), size

    def read_for(self, tokenizer: Tokenizer) -> None:
        """See `DocumentReader.read_for`."""
        if isinstance(self._text_of, SupervisedRecord):
            self._text_of.tokenizer = tokenizer
            self.identity = {**self.identity, "chat_template": self._text_of.identity}

    def pieces(self) -> Iterator[Piece]:
        """See `DocumentReader.pieces`; documents without text are passed over."""
        self._left_out.reset()
        self._documents = 0
        for file in self._files:
            yield from self._text(file) if file.disk.kind == "text" else self._records(file)
        if not self._documents:
            raise InputError(f"{self.name} holds no text in its {self._source.part!r} part: look at what it holds")

    @property
    def left_out(self) -> str:
        """See `DocumentReader.left_out`."""
        return str(self._left_out)

    def _text(self, file: _File) -> Iterator[Piece]:
        """The one document of a text file, which is read twice if it has to be known whether it is a copy."""
        if self._left_out.finds_copies and self._left_out.is_copy(self._blocks(file)):
            return
        given = 0
        for piece in decoded_pieces(file.disk.path, self._blocks(file), start=file.span[0]):
            yield dataclasses.replace(piece, amount=self._read - given)
            given = self._read
            self._documents += piece.ends_document

    def _blocks(self, file: _File) -> Iterator[bytes]:
        """The blocks of the span of a text file; `_read` counts the bytes on disk that were read for them."""
        (start, end), packing = file.span, file.disk.compression
        with open_stream(file.disk) as stream:
            skip(stream, start)
            position = start
            while block := stream.file.read(PIECE_BYTES if end is None else min(PIECE_BYTES, end - position)):
                position += len(block)
                self._read = position - start if packing is None else stream.packed.tell()
                yield block

    def _records(self, file: _File) -> Iterator[Piece]:
        """The documents of a file of records."""
        if file.disk.kind == "lines":
            texts = line_texts(file.disk, file.span, text_of=self._text_of, on_bad=self._left_out.take_bad)
        else:
            rows = row_texts(file.disk, file.span, text_of=self._text_of, on_bad=self._left_out.take_bad)
            texts = ((text, file.disk.size * row // file.rows) for text, row in rows)
        given = 0
        for text, read in texts:
            if self._left_out.finds_copies and self._left_out.is_copy([str(text).encode()]):
                continue
            self._documents += 1
            yield from document_pieces(text, amount=read - given)
            given = read


def _found(path: str) -> tuple[Path, list[str]]:
    """The folder of the files that a path names, and their names below it, sorted.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    try:
        if os.path.isdir(path):
            names = find_files(Path(path), "**/*")
            # The likes of .git and .DS_Store are no data.
            names = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
            root = Path(path)
        elif os.path.lexists(path):
            if not os.path.isfile(path):
                raise InputError(f"{path} is a pipe, a socket, a device or a link to nothing: give files")
            root, names = Path(path).parent, [Path(path).name]
        else:
            root, names = _matches(path)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path!r}: {reason(error)}") from None
    if not names:
        raise InputError(f"there is no file, no folder with files and no match of a glob at {path!r}")
    return root, names


def _matches(pattern: str) -> tuple[Path, list[str]]:
    """The folder above the first wildcard of a glob, and the files below it that match."""
    parts = Path(pattern).parts
    first = next((i for i, part in enumerate(parts) if set("*?[") & set(part)), None)
    root = Path(*parts[:first])
    if first is None or not root.is_dir():
        return root, []
    return root, find_files(root, "/".join(parts[first:]))
