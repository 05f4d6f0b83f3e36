"""The source "text_folder": the files of a folder as documents, some of which are held out for validation."""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from mamba_jax.data.config import TextFolderSource
from mamba_jax.data.documents import DocumentReader, Piece
from mamba_jax.data.sources.formats import NO_PROSE, stat_of_content
from mamba_jax.data.sources.held_out import take_part, text_cut
from mamba_jax.data.sources.text_files import find_files
from mamba_jax.data.sources.text_pieces import PIECE_BYTES, decoded_pieces
from mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
    """Bytes `start` to `end` of a file, with the size and time by which a later change of the file is noticed."""

    name: str
    size: int
    modified_ns: int
    start: int
    end: int


class TextFolder(DocumentReader):
    """Files below a folder, sorted by relative name, one document a file.

    A hash of its name decides whether a file is held out. If this leaves one of the two parts empty (as with a single
    file), every file is cut in two instead, and its end is held out.
    """

    unit = "bytes"

    def __init__(self, source: TextFolderSource) -> None:
        self._root = _folder(source)
        self.name = str(self._root)
        names = find_files(self._root, source.pattern)
        if not names:
            raise InputError(f"no file in {self.name} matches {source.pattern!r}")
        fraction = source.validation_fraction
        files = {name: self._whole(name) for name in names}
        cut = functools.partial(self._cut_in_two, fraction)
        self._documents = take_part(files, source.part, fraction, cut=cut, place=self.name).files
        self.total = sum(document.end - document.start for document in self._documents)
        self.identity = {
            "source": dataclasses.asdict(source),
            "root": str(self._root.resolve()),
            "files": [dataclasses.astuple(document) for document in self._documents],
        }

    def _whole(self, name: str) -> _Document:
        """A file as one document, all of its bytes; refuses empty files and formats that are not plain text."""
        path = self._root / name
        if (suffix := path.suffix.lower()) in NO_PROSE:
            raise InputError(
                f"{path} is not plain text by its suffix {suffix}, and its syntax would be trained on: read JSON "
                "lines, parquet and packed text by FilesSource (--files), or exclude it by the pattern"
            )
        found = stat_of_content(path, exclude_by="the pattern")
        return _Document(name=name, size=found.st_size, modified_ns=found.st_mtime_ns, start=0, end=found.st_size)

    def _cut_in_two(self, fraction: float, document: _Document) -> tuple[_Document | None, _Document | None]:
        """The bytes of a file to train on and those that are held out, each None if it is empty."""
        path = self._root / document.name

        def read(start: int, length: int) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)

        try:
            position = text_cut(read, document.size, fraction)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        pieces = dataclasses.replace(document, end=position), dataclasses.replace(document, start=position)
        train, validation = (piece if piece.start < piece.end else None for piece in pieces)
        return train, validation

    def pieces(self) -> Iterator[Piece]:
        for document in self._documents:
            path = self._root / document.name
            yield from decoded_pieces(path, _blocks(path, document), start=document.start)


def _folder(source: TextFolderSource) -> Path:
    """The folder of a source, which may lie in an installed package; raises an InputError if it cannot be listed."""
    root = Path(source.path)
    if source.package is not None:
        root = _package_folder(source.package) / source.path
    try:
        os.scandir(root).close()
    except (OSError, ValueError) as error:
        raise InputError(f"no text folder {str(root)!r}: {getattr(error, 'strerror', error)}") from None
    return root


def _package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it or, for a dotted name, its parents."""
    top, *below = package.split(".")
    try:
        spec = importlib.util.find_spec(top) if all(map(str.isidentifier, [top, *below])) else None
    except (ImportError, ValueError):
        spec = None
    for location in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(location, *below)
        if folder.is_dir():
            return folder
    raise InputError(f"no package {package!r} is installed, which should hold the text: pip install it")


def _blocks(path: Path, document: _Document) -> Iterator[bytes]:
    """Reads a document in blocks.

    Raises:
        InputError: the file cannot be read, or has changed since it was found.
    """
    try:
        with path.open("rb") as file:
            file.seek(document.start)
            for offset in range(document.start, document.end, PIECE_BYTES):
                block = file.read(min(PIECE_BYTES, document.end - offset))
                found = os.fstat(file.fileno())
                if (found.st_size, found.st_mtime_ns) != (document.size, document.modified_ns):
                    raise InputError(f"{path} was changed while it was read: start again")
                yield block
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
