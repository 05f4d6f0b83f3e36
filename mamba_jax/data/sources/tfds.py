"""The source "tfds": the records of a TensorFlow Datasets split as documents, read without TensorFlow."""

import contextlib
import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mamba_jax.data.config import TfdsSource
from mamba_jax.data.documents import DocumentReader, Piece
from mamba_jax.errors import InputError, brief

# Families of TFDS builders that TFDS finds by name only after their module was imported.
_LEGACY_FAMILIES = ("text", "question_answering", "summarization", "translate")


class TfdsDocuments(DocumentReader):
    """One feature of a TensorFlow Datasets split stored as array_record; records without text are passed over."""

    unit = "documents"

    def __init__(self, source: TfdsSource) -> None:
        with _no_foreign_code():
            builder = _builder(source)
        self.name = f"{builder.info.full_name} {source.split}"
        self._field = source.text_field
        self._records = _records(builder, source)
        self.total = len(self._records)
        if self.total == 0:
            raise InputError(f"TFDS split {self.name} is empty")
        self._check_field()
        try:
            stats = [(path.name, path.stat()) for path in sorted(Path(builder.data_path).glob("*"))]
        except OSError as error:
            raise InputError(f"cannot read TFDS set {self.name}: {error.strerror} ({error.filename})") from None
        self.identity = {
            "source": dataclasses.asdict(source),
            "set": builder.info.full_name,
            "records": self.total,
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        }

    def _check_field(self) -> None:
        """Makes sure that the first record has the field `text_field` and that it holds text."""
        record = self._record(0)
        if self._field not in record:
            raise InputError(
                f"TFDS set {self.name} has no feature {self._field!r}: set text_field to one of "
                + ", ".join(sorted(record))
            )
        value = record[self._field]
        if not isinstance(value, str | bytes):
            raise InputError(f"feature {self._field!r} of TFDS set {self.name} is not text but {type(value).__name__}")

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except Exception as error:
            raise InputError(
                f"record {index} of TFDS set {self.name} cannot be read: {brief(error)}; restore or prepare it again"
            ) from error

    def pieces(self) -> Iterator[Piece]:
        """Yields each record's text as one whole document; raises an InputError if all are empty."""
        any_text = False
        for index in range(self.total):
            value = self._record(index)[self._field]
            try:
                data = value if isinstance(value, bytes) else value.encode()
                text = data.decode()
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                raise InputError(
                    f"record {index} of TFDS set {self.name} is not UTF-8 text: {error.reason} at {error.start}"
                ) from None
            if text:
                any_text = True
                yield Piece(text=text, num_bytes=len(data), continues=False, ends_document=True)
        if not any_text:
            raise InputError(f"every {self._field!r} of TFDS set {self.name} is empty")


@contextlib.contextmanager
def _no_foreign_code() -> Iterator[None]:
    """Context manager that keeps TFDS from importing modules outside of TFDS that the files of a data set name.

    The `features.json` of a set names a Python class for each feature, and TFDS would import that class from anywhere.
    """
    import tensorflow_datasets as tfds

    connector: Any = tfds.features.FeatureConnector
    original = connector.__dict__["cls_from_name"]

    def cls_from_name(cls: Any, name: str) -> Any:
        if name not in cls._registered_features and not name.startswith("tensorflow_datasets."):
            raise ValueError(f"its features.json names {name!r}, which is not a class of TFDS and is not imported")
        return original.__get__(None, cls)(name)

    connector.cls_from_name = classmethod(cls_from_name)
    try:
        yield
    finally:
        connector.cls_from_name = original


def require_prepared(source: TfdsSource) -> None:
    """Makes sure that a set can be read without a download.

    Raises:
        InputError: there is no such set, or it is not prepared where `source` says.
    """
    with _no_foreign_code():
        builder = _find_builder(source)
    if not builder.is_prepared():
        raise InputError(
            f"TFDS set {source.name!r} is not prepared in {builder.data_path}: prepare it there, or give other text"
        )


def _builder(source: TfdsSource) -> Any:
    """The builder of a prepared set; a published set that is not prepared yet is downloaded and prepared."""
    builder = _find_builder(source)
    try:
        if not os.path.isdir(source.name):
            builder.download_and_prepare()
    except Exception as error:
        raise InputError(
            f"TFDS set {source.name!r} is not prepared in {builder.data_path} and could not be prepared here: "
            f"{brief(error)}; on a machine with TensorFlow and network run `tfds build {source.name} "
            "--file_format=array_record` and point data_dir at the result"
        ) from error
    return builder


def _find_builder(source: TfdsSource) -> Any:
    """TFDS's builder of the set in a folder, if `name` is one, else of the published set of that name."""
    import tensorflow_datasets as tfds

    if os.path.isdir(source.name):
        return _prepared(source.name)
    try:
        _import_legacy_builder(source.name)
        # Without a format TFDS would write TFRecord, which needs TensorFlow.
        return tfds.builder(source.name, data_dir=source.data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise InputError(f"TFDS knows no set {source.name!r}{_suggestion(source.name)}") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot open TFDS set {source.name!r}: {brief(error)}") from error


def _prepared(folder: str) -> Any:
    """TFDS's builder of the set that was prepared in this folder; any failure becomes an InputError."""
    import tensorflow_datasets as tfds

    advice = "name the version folder that holds dataset_info.json"
    for path in (Path(folder, "dataset_info.json"), Path(folder, "features.json")):
        # TFDS would open a pipe and wait for its other end.
        if path.exists() and not path.is_file():
            raise InputError(f"{folder!r} is not a prepared TFDS set: {path} is not a file; {advice}")
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        raise InputError(f"{folder!r} is not a prepared TFDS set; {advice} ({brief(error)})") from error


def _records(builder: Any, source: TfdsSource) -> Sequence[Any]:
    """The records of the chosen split, which are read as they are asked for."""
    try:
        return builder.as_data_source(split=source.split)
    except NotImplementedError:
        raise InputError(
            f"TFDS set {builder.info.full_name} in {builder.data_path} is stored as {builder.info.file_format.value}, "
            "which needs TensorFlow: prepare it with --file_format=array_record"
        ) from None
    except Exception as error:
        known = ", ".join(sorted(builder.info.splits))
        raise InputError(
            f"TFDS set {builder.info.full_name} cannot give split {source.split!r} (it has: {known}): {brief(error)}"
        ) from error


def _import_legacy_builder(name: str) -> None:
    """Imports TFDS's own module for a text set, so that TFDS knows the set; refuses sets that need foreign code."""
    import tensorflow_datasets as tfds

    known, _ = tfds.core.naming.parse_builder_name_kwargs(name)
    if known.namespace is not None:
        raise InputError(
            f"TFDS set {name!r} is not one of TFDS itself, and code from elsewhere is not run: prepare it and give its "
            "version folder as name"
        )
    for family in _LEGACY_FAMILIES if known.name.isidentifier() else ():
        module = f"tensorflow_datasets.{family}.{known.name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


def _suggestion(name: str) -> str:
    import tensorflow_datasets as tfds

    known = set(tfds.list_builders(with_community_datasets=False))
    for family in _LEGACY_FAMILIES:
        known.update(path.stem for path in (Path(tfds.__file__).parent / family).iterdir() if path.suffix != ".pyc")
    close = difflib.get_close_matches(name.split("/")[0].split(":")[0], sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; a folder of a prepared set works too"
