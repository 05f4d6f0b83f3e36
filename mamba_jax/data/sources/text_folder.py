"""The source "text_folder": the files of a folder as documents, some of which are held out for validation."""

import codecs
import dataclasses
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mamba_jax.data.config import TextFolderSource
from mamba_jax.data.documents import DocumentReader, Piece
from mamba_jax.data.sources.text_files import find_files
from mamba_jax.errors import InputError

# Files longer than 1 MiB are tokenised in pieces of about that size, which bounds memory.
_PIECE_BYTES = 2**20
# Places where a document may be cut into pieces, the best first: behind a single line break, or before a single space.
# There a token ends in any case. Across blank lines, indentation and "\r\n" a token may continue.
_CUTS = (re.compile(r"\S\n(?=\S)"), re.compile(r"\w(?= \w)"))
# How many characters at the end of a piece are searched for such a place: a judgement, far longer than usual lines.
_CUT_WINDOW = 2**14
# Suffixes of archives and record formats. Read as plain text, they would train the model on their syntax.
_NO_PROSE = frozenset(
    f".{name}"
    for names in (
        ("csv", "db", "json", "jsonl", "jsonlines", "ndjson", "pickle", "pkl", "sqlite", "tsv", "xlsx"),
        ("array_record", "arrow", "avro", "feather", "h5", "hdf5", "orc", "parquet", "tfrecord"),
        ("bin", "npy", "npz", "safetensors"),
        ("7z", "bz2", "gz", "lz4", "rar", "tar", "tgz", "xz", "zip", "zst"),
        ("doc", "docx", "epub", "odt", "pdf"),
    )
    for name in names
)


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
        self._documents = self._part([self._whole(name) for name in names], source)
        self.total = sum(document.end - document.start for document in self._documents)
        self.identity = {
            "source": dataclasses.asdict(source),
            "root": str(self._root.resolve()),
            "files": [dataclasses.astuple(document) for document in self._documents],
        }

    def _whole(self, name: str) -> _Document:
        """A file as one document, all of its bytes; refuses empty files and formats that are not plain text."""
        path = self._root / name
        if (suffix := path.suffix.lower()) in _NO_PROSE:
            raise InputError(
                f"{path} is not plain text by its suffix {suffix}, and its syntax would be trained on: unpack it, or "
                "write its texts to files such as .txt, and exclude it by the pattern"
            )
        try:
            found = path.stat()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        if found.st_size == 0:
            raise InputError(f"{path} is empty: remove it, or exclude it by the pattern")
        return _Document(name=name, size=found.st_size, modified_ns=found.st_mtime_ns, start=0, end=found.st_size)

    def _part(self, documents: list[_Document], source: TextFolderSource) -> list[_Document]:
        """The training or validation part: whole files, or a piece of every file if all files fall in the same part."""
        if source.part == "all":
            return documents
        fraction, wanted = source.validation_fraction, source.part == "validation"
        held_out = [_is_held_out(document.name, fraction) for document in documents]
        if 0 < fraction < 1 and len(set(held_out)) == 1:
            cut = [_cut_in_two(self._root / document.name, document, fraction)[wanted] for document in documents]
            part = [document for document in cut if document.start < document.end]
        else:
            part = [document for document, held in zip(documents, held_out, strict=True) if held == wanted]
        if not part:
            raise InputError(
                f"none of the {len(documents)} files in {self.name} falls in the {source.part!r} part at "
                f"validation_fraction={fraction}: change the fraction"
            )
        return part

    def pieces(self) -> Iterator[Piece]:
        for document in self._documents:
            yield from _document_pieces(self._root / document.name, document)


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


def _is_held_out(name: str, fraction: float) -> bool:
    """Whether a file is held out; only its name decides, so that adding files moves no other file between the parts."""
    # `fsencode` gives the bytes of the name on disk, which need not be UTF-8.
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) / 2**64 < fraction


def _cut_in_two(path: Path, document: _Document, fraction: float) -> tuple[_Document, _Document]:
    position = _cut_position(path, document.size, fraction)
    return dataclasses.replace(document, end=position), dataclasses.replace(document, start=position)


def _cut_position(path: Path, size: int, fraction: float) -> int:
    """Position in bytes where the held-out end of a file begins, near `(1 - fraction) * size`.

    The cut is behind the nearest line break, else the nearest space, else at the next character. Neither side gets less
    than half of its share. For a file that is too short to be cut, the position is its size.
    """
    end = round(size * fraction)
    target = size - end
    reach = min(end // 2, target // 2, _PIECE_BYTES)
    try:
        with path.open("rb") as file:
            file.seek(target - reach)
            near = file.read(2 * reach + 4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    for separator in (b"\n", b" "):
        before, behind = near.rfind(separator, 0, reach), near.find(separator, reach, 2 * reach)
        cuts = [target - reach + found + 1 for found in (before, behind) if found >= 0]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    behind = near[reach:]
    return target + next((i for i, byte in enumerate(behind) if byte & 0xC0 != 0x80), len(behind))


def _document_pieces(path: Path, document: _Document) -> Iterator[Piece]:
    """Decodes a document block by block, so that a large file never lies in memory as a whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    continues, rest = False, ""
    for offset, block in _blocks(path, document):
        last = offset + len(block) == document.end
        try:
            text = rest + decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            # The decoder keeps an incomplete character of the last block in front of this one.
            position = offset + len(block) - len(error.object) + error.start
            raise InputError(
                f"{path} is not UTF-8 text: {error.reason} at byte {position}; convert or exclude it"
            ) from None
        cut = len(text) if last else _cut(text)
        if cut:
            yield Piece(text=text[:cut], num_bytes=len(text[:cut].encode()), continues=continues, ends_document=last)
            continues = True
        rest = text[cut:]


def _blocks(path: Path, document: _Document) -> Iterator[tuple[int, bytes]]:
    """Reads a document in blocks; yields the offset in the file and the bytes of each.

    Raises:
        InputError: the file cannot be read, or has changed since it was found.
    """
    try:
        with path.open("rb") as file:
            file.seek(document.start)
            for offset in range(document.start, document.end, _PIECE_BYTES):
                block = file.read(min(_PIECE_BYTES, document.end - offset))
                found = os.fstat(file.fileno())
                if (found.st_size, found.st_mtime_ns) != (document.size, document.modified_ns):
                    raise InputError(f"{path} was changed while it was read: start again")
                yield offset, block
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _cut(text: str) -> int:
    """Where to end a piece so that, if possible, the tokens of the pieces are those of the whole text; see `_CUTS`."""
    start = max(0, len(text) - _CUT_WINDOW)
    for place in _CUTS:
        cuts = [found.end() for found in place.finditer(text, start)]
        if cuts:
            return cuts[-1]
    return text.rfind("\n") + 1 or len(text)
