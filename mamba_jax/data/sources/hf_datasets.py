"""The source "hf_dataset": rows of a set of the Hugging Face `datasets` library, stored or streamed."""

import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_jax.data.config import HuggingFaceSource
from mamba_jax.data.documents import DocumentReader, Piece
from mamba_jax.data.sources.left_out import LeftOut
from mamba_jax.data.sources.records import BadRecord
from mamba_jax.data.sources.supervised import SupervisedRecord, document_pieces, record_reader
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError, brief

# Rows that are decoded at once. A judgement: pages of text, so that a batch takes a megabyte.
_BATCH_ROWS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a split: a `Dataset` or an `IterableDataset`, their number if it is known, and what identifies them."""

    rows: Any
    total: int | None
    identity: Any


class HuggingFaceDocuments(DocumentReader):
    """The text of each row of a split; rows without text are passed over."""

    unit = "documents"

    def __init__(self, source: HuggingFaceSource) -> None:
        self._text_of = record_reader(source)
        self._left_out = LeftOut(skip_bad=source.skip_bad, deduplicate=source.deduplicate)
        self.is_supervised = source.records == "supervised"
        self.name = f"{source.name} {source.split}"
        try:
            found = _saved(source) if _is_saved(source.name) else _loaded(source)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"cannot open the Hugging Face dataset {source.name!r}: {brief(error)}") from error
        names = found.rows.column_names
        try:
            self._rows = found.rows if names is None else found.rows.select_columns(self._text_of.fields(names))
        except BadRecord as error:
            raise InputError(f"Hugging Face dataset {self.name} {error}") from None
        self._first, self.total = 0, found.total or 0
        if source.part != "all":
            self._take_part(source, self.total)
        self.identity = {"source": dataclasses.asdict(source), "set": found.identity}

    def _take_part(self, source: HuggingFaceSource, total: int) -> None:
        """Keeps the rows of one side of the split: the last ones are held out."""
        cut = total - max(1, round(total * source.validation_fraction))
        if not 0 < cut < total:
            raise InputError(f"Hugging Face dataset {self.name} has {total} rows, too few to hold some out: use more")
        first, end = (0, cut) if source.part == "train" else (cut, total)
        self._rows = self._rows.select(range(first, end))
        self._first, self.total = first, end - first
        self.note = f"{self.name}: held out are the last {total - cut:,} of {total:,} rows"

    def read_for(self, tokenizer: Tokenizer) -> None:
        """See `DocumentReader.read_for`."""
        if isinstance(self._text_of, SupervisedRecord):
            self._text_of.tokenizer = tokenizer
            self.identity = {**self.identity, "chat_template": self._text_of.identity}

    @property
    def left_out(self) -> str:
        """See `DocumentReader.left_out`."""
        return str(self._left_out)

    def pieces(self) -> Iterator[Piece]:
        """See `DocumentReader.pieces`."""
        self._left_out.reset()
        has_text, given = False, 0
        for number, row in enumerate(self._records(), start=1):
            try:
                text = self._text_of(row)
            except BadRecord as error:
                self._left_out.take_bad(f"Hugging Face dataset {self.name} row {self._first + number} {error}")
                continue
            if not text or (self._left_out.finds_copies and self._left_out.is_copy([str(text).encode()])):
                continue
            has_text = True
            yield from document_pieces(text, amount=number - given)
            given = number
        if not has_text:
            raise InputError(f"Hugging Face dataset {self.name} holds no text: look at what it holds")

    def _records(self) -> Iterator[dict[str, Any]]:
        """The rows; whatever the library raises, such as for a lost network, becomes an InputError."""
        batches = self._rows.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        while True:
            try:
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()
            except Exception as error:
                raise InputError(
                    f"Hugging Face dataset {self.name} cannot be read on: {brief(error)}; give the command again"
                ) from error
            if rows is None:
                return
            yield from rows


def _library() -> Any:
    """The package `datasets`, which is no dependency of this one."""
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            "Hugging Face datasets need the package `datasets`, which is not installed: pip install "
            "'mamba-jax[datasets]'"
        ) from None


def _is_saved(name: str) -> bool:
    return any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))


def _saved(source: HuggingFaceSource) -> _Rows:
    """The rows of a folder that `save_to_disk` wrote, with one split or several."""
    datasets = _library()
    found = datasets.load_from_disk(source.name)
    if isinstance(found, dict):
        if source.split not in found:
            raise InputError(f"{source.name!r} has no split {source.split!r}: choose one of {', '.join(found)}")
        found = found[source.split]
    elif source.split not in ("train", str(found.split)):
        raise InputError(f"{source.name!r} has one split alone, {found.split}: leave split={source.split!r} out")
    paths = [Path(file["filename"]) for file in found.cache_files]
    stats = [(path.name, path.stat()) for path in paths]
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return _Rows(rows=found, total=len(found), identity=[str(Path(source.name).resolve()), files])


def _loaded(source: HuggingFaceSource) -> _Rows:
    """The rows of a published set, or of a folder with data files; stored by the library first unless streamed."""
    datasets = _library()
    builder = datasets.load_dataset_builder(source.name, source.subset, revision=source.revision)
    # The hash covers the revision of a published set, and the names, sizes and times of a folder's files.
    identity = [builder.dataset_name, builder.config_id, builder.hash, str(builder.info.version)]
    if source.streaming:
        rows = builder.as_streaming_dataset(source.split)
        known = (builder.info.splits or {}).get(source.split)
        return _Rows(rows=rows, total=known.num_examples if known else None, identity=identity)
    builder.download_and_prepare()
    rows = builder.as_dataset(source.split)
    return _Rows(rows=rows, total=len(rows), identity=identity)
