"""Documents of a folder of text files or of a TensorFlow Datasets set, one piece of text at a time."""

import abc
import codecs
import dataclasses
import difflib
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mamba_jax.config import TextFolderSource, TfdsSource
from mamba_jax.errors import InputError

# Longer files are tokenised in pieces, which bounds memory whatever the size of a file.
_PIECE_BYTES = 2**20
# Families of TFDS builders that TFDS finds by name only after their module was imported.
_LEGACY_FAMILIES = ("text", "question_answering", "summarization", "translate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A document, or a part of one too long to be held whole.

    Attributes:
        text: the piece.
        num_bytes: its length in UTF-8.
        ends_document: no further piece of this document follows.
    """

    text: str
    num_bytes: int
    ends_document: bool


class DocumentReader(abc.ABC):
    """Documents in a fixed order.

    Attributes:
        name: of the source, for messages.
        identity: JSON value that changes whenever the documents may have changed.
        total: amount of work, in `unit`.
        unit: what progress is counted in.
    """

    name: str
    identity: Any
    total: int
    unit: Literal["bytes", "documents"]

    @abc.abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All documents, in order.

        Raises:
            InputError: a document is not UTF-8 text, or there is none at all.
        """


def open_documents(source: TextFolderSource | TfdsSource) -> DocumentReader:
    """Finds the documents of `source` without reading them.

    Raises:
        InputError: there is no such folder, package, file or set.
    """
    return TextFolder(source) if isinstance(source, TextFolderSource) else TfdsDocuments(source)


class TextFolder(DocumentReader):
    """Files below a folder, sorted by relative name, one document a file."""

    unit = "bytes"

    def __init__(self, source: TextFolderSource) -> None:
        self._root = _folder(source)
        self.name = str(self._root)
        try:
            found = [path for path in self._root.glob(source.pattern) if path.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"text folder pattern {source.pattern!r} is no relative glob: {error}") from None
        if not found:
            raise InputError(f"no file in {self.name} matches {source.pattern!r}")
        names = sorted(path.relative_to(self._root).as_posix() for path in found)
        self.files = [name for name in names if _in_part(name, source)]
        if not self.files:
            raise InputError(
                f"none of the {len(names)} files in {self.name} falls in the {source.part!r} part at "
                f"validation_fraction={source.validation_fraction}: change the fraction"
            )
        stats = [(self._root / name).stat() for name in self.files]
        for name, stat in zip(self.files, stats, strict=True):
            if stat.st_size == 0:
                raise InputError(f"{self._root / name} is empty: remove it, or exclude it by the pattern")
        self.total = sum(stat.st_size for stat in stats)
        self.identity = {
            "source": dataclasses.asdict(source),
            "root": str(self._root.resolve()),
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(self.files, stats, strict=True)],
        }

    def pieces(self) -> Iterator[Piece]:
        for name in self.files:
            yield from _file_pieces(self._root / name)


def _folder(source: TextFolderSource) -> Path:
    root = Path(source.path)
    if source.package is not None:
        # `importlib.resources` would import the package, and with it everything the package imports.
        try:
            spec = importlib.util.find_spec(source.package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"no package {source.package!r} is installed, which should hold the text: pip install it")
        root = Path(spec.submodule_search_locations[0]) / source.path
    if not root.is_dir():
        raise InputError(f"no text folder {str(root)!r}")
    return root


def _in_part(name: str, source: TextFolderSource) -> bool:
    """Whether a file belongs to the part; its name alone decides, so adding files moves no other file."""
    if source.part == "all":
        return True
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return (position < source.validation_fraction) == (source.part == "validation")


def _file_pieces(path: Path) -> Iterator[Piece]:
    """Cuts behind line breaks where there are any, so that the cut falls between tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    offset, rest = 0, ""
    with path.open("rb") as file:
        block = file.read(_PIECE_BYTES)
        while block:
            following = file.read(_PIECE_BYTES)
            try:
                text = rest + decoder.decode(block, final=not following)
            except UnicodeDecodeError as error:
                # The decoder keeps an incomplete character of the last block in front of this one.
                position = offset + len(block) - len(error.object) + error.start
                raise InputError(
                    f"{path} is not UTF-8 text: {error.reason} at byte {position}; convert or exclude it"
                ) from None
            offset += len(block)
            if not following:
                yield Piece(text=text, num_bytes=len(text.encode()), ends_document=True)
                return
            cut = text.rfind("\n") + 1 or len(text)
            text, rest = text[:cut], text[cut:]
            yield Piece(text=text, num_bytes=len(text.encode()), ends_document=False)
            block = following


class TfdsDocuments(DocumentReader):
    """One feature of a TensorFlow Datasets split stored as array_record; records without text are passed over."""

    unit = "documents"

    def __init__(self, source: TfdsSource) -> None:
        builder = _tfds_builder(source)
        self.name = f"{builder.info.full_name} {source.split}"
        self._field = source.text_field
        self._records = _tfds_records(builder, source)
        self.total = len(self._records)
        if self.total == 0:
            raise InputError(f"TFDS split {self.name} is empty")
        self._check_field()
        folder = Path(builder.data_path)
        self.identity = {
            "source": dataclasses.asdict(source),
            "set": builder.info.full_name,
            "records": self.total,
            "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*"))],
        }

    def _check_field(self) -> None:
        record = self._records[0]
        if self._field not in record:
            raise InputError(
                f"TFDS set {self.name} has no feature {self._field!r}: set text_field to one of "
                + ", ".join(sorted(record))
            )
        value = record[self._field]
        if not isinstance(value, str | bytes):
            raise InputError(f"feature {self._field!r} of TFDS set {self.name} is no text but {type(value).__name__}")

    def pieces(self) -> Iterator[Piece]:
        any_text = False
        for index in range(self.total):
            value = self._records[index][self._field]
            try:
                data = value if isinstance(value, bytes) else value.encode()
                text = data.decode()
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                raise InputError(
                    f"record {index} of TFDS set {self.name} is not UTF-8 text: {error.reason} at {error.start}"
                ) from None
            if text:
                any_text = True
                yield Piece(text=text, num_bytes=len(data), ends_document=True)
        if not any_text:
            raise InputError(f"every {self._field!r} of TFDS set {self.name} is empty")


def require_prepared(source: TfdsSource) -> None:
    """Makes sure that a set can be read without a download.

    Raises:
        InputError: there is no such set, or it is not prepared where `source` says.
    """
    builder = _find_builder(source)
    if not builder.is_prepared():
        raise InputError(
            f"TFDS set {source.name!r} is not prepared in {builder.data_path}: prepare it there, or give other text"
        )


def _tfds_builder(source: TfdsSource) -> Any:
    """The builder of a prepared set; a published set that is not prepared yet is downloaded and prepared."""
    builder = _find_builder(source)
    try:
        if not Path(source.name).is_dir():
            builder.download_and_prepare()
    except Exception as error:
        raise InputError(
            f"TFDS set {source.name!r} is not prepared in {builder.data_path} and could not be prepared here: "
            f"{_one_line(error)}; on a machine with TensorFlow and network run `tfds build {source.name} "
            "--file_format=array_record` and point data_dir at the result"
        ) from error
    return builder


def _find_builder(source: TfdsSource) -> Any:
    import tensorflow_datasets as tfds

    if Path(source.name).is_dir():
        try:
            return tfds.builder_from_directory(source.name)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{source.name!r} is no prepared TFDS set; name the version folder that holds dataset_info.json "
                f"({_one_line(error)})"
            ) from None
    _import_legacy_builder(source.name)
    try:
        # Without a format TFDS would write TFRecord, which needs TensorFlow.
        return tfds.builder(source.name, data_dir=source.data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise InputError(f"TFDS knows no set {source.name!r}{_suggestion(source.name)}") from None
    except Exception as error:
        raise InputError(f"cannot open TFDS set {source.name!r}: {_one_line(error)}") from error


def _tfds_records(builder: Any, source: TfdsSource) -> Sequence[Any]:
    try:
        return builder.as_data_source(split=source.split)
    except NotImplementedError:
        raise InputError(
            f"TFDS set {builder.info.full_name} in {builder.data_path} is stored as {builder.info.file_format.value}, "
            "which needs TensorFlow: prepare it with --file_format=array_record"
        ) from None
    except (ValueError, KeyError) as error:
        known = ", ".join(sorted(builder.info.splits))
        raise InputError(
            f"TFDS set {builder.info.full_name} cannot give split {source.split!r} (it has: {known}): "
            f"{_one_line(error)}"
        ) from None


def _import_legacy_builder(name: str) -> None:
    base = name.split("/")[0].split(":")[0]
    for family in _LEGACY_FAMILIES if base.isidentifier() else ():
        module = f"tensorflow_datasets.{family}.{base}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


def _suggestion(name: str) -> str:
    import tensorflow_datasets as tfds

    known = set(tfds.list_builders(with_community_datasets=False))
    for family in _LEGACY_FAMILIES:
        known.update(path.stem for path in (Path(tfds.__file__).parent / family).iterdir() if path.suffix != ".pyc")
    close = difflib.get_close_matches(name.split("/")[0].split(":")[0], sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; a folder of a prepared set works too"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
