"""Sets of the Hugging Face library, saved to disk or loaded from files by its own builders; nothing is fetched."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mamba_jax.config import HuggingFaceSource
from mamba_jax.data import prepare
from mamba_jax.data.shards import TokenDataset
from mamba_jax.errors import InputError

ROWS = [{"text": f"the text of number {i}, é", "title": f"T{i}", "n": i} for i in range(250)]


def test_without_the_library_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"need the package `datasets`.*pip install 'mamba-jax\[datasets\]'"):
        HuggingFaceSource(name=str(tmp_path)).open()


def test_a_streamed_set_has_no_held_out_rows() -> None:
    with pytest.raises(InputError, match="part='train' needs the number of rows, which a streamed set does not tell"):
        HuggingFaceSource(name="x", streaming=True, part="train")
    with pytest.raises(InputError, match="'no/set' may have to be downloaded: give a folder"):
        HuggingFaceSource(name="no/set").require_present()


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    library.disable_progress_bars()
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def write_rows(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def loadable(datasets: Any, tmp_path: Path) -> Path:
    return write_rows(tmp_path / "files", ROWS)


@pytest.fixture
def saved(datasets: Any, loadable: Path, tmp_path: Path) -> Path:
    rows = datasets.load_dataset(str(loadable))["train"]
    datasets.DatasetDict({"train": rows, "test": rows.select(range(9))}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def texts(path: Path, **fields: Any) -> list[str]:
    reader = HuggingFaceSource(name=str(path), **fields).open()
    pieces = list(reader.pieces())
    assert all(piece.ends_document and piece.num_bytes == len(piece.text.encode()) for piece in pieces)
    assert not reader.total or sum(piece.amount or 0 for piece in pieces) <= reader.total
    return [piece.text for piece in pieces]


def test_saved_sets(saved: Path) -> None:
    every = [row["text"] for row in ROWS]
    assert texts(saved) == every
    assert texts(saved, split="test", template="{title}: {n}")[-1] == "T8: 8"
    assert texts(saved / "train") == every
    train, validation = (texts(saved, part=part, validation_fraction=0.1) for part in ("train", "validation"))
    assert (train, validation) == (every[:225], every[225:])
    note = HuggingFaceSource(name=str(saved), part="train").open().note
    assert note == f"{saved} train: held out are the last 12 of 250 rows"


@pytest.mark.parametrize("streaming", [False, True])
def test_loaded_sets(loadable: Path, streaming: bool) -> None:
    assert texts(loadable, streaming=streaming) == [row["text"] for row in ROWS]
    before = HuggingFaceSource(name=str(loadable), streaming=streaming).open().identity
    assert HuggingFaceSource(name=str(loadable), streaming=streaming).open().identity == before
    json.dumps(before)
    with (loadable / "train.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    assert HuggingFaceSource(name=str(loadable), streaming=streaming).open().identity != before
    assert len(texts(loadable, streaming=streaming)) == 251
    assert len(texts(loadable, streaming=streaming, deduplicate="exact")) == 250


def test_split_expressions_of_loaded_sets(loadable: Path) -> None:
    assert texts(loadable, split="train[:10%]") == [row["text"] for row in ROWS[:25]]


def test_the_prepare_command_streams(loadable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--hf", str(loadable), "--streaming", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    prepare.main()
    assert TokenDataset(tmp_path / "out").num_documents == 250


def test_mistakes_get_one_line(datasets: Any, saved: Path, loadable: Path, tmp_path: Path) -> None:
    null = write_rows(tmp_path / "with null", [{"text": "a"}, {"text": None}])
    for path, fields, expected in (
        (saved, {"split": "dev"}, "has no split 'dev': choose one of train, test"),
        (saved / "train", {"split": "dev"}, "has one split alone, train: leave split='dev' out"),
        (
            saved,
            {"text_field": "body"},
            "has no column 'body': set text_field or template to those it has, text, title",
        ),
        (saved, {"text_field": "n"}, "train row 1 has no text but int in its field 'n'; mend it, or pass such"),
        (null, {}, "train row 2 has null in its field 'text'"),
        (null, {"part": "validation"}, "train row 2 has null in its field 'text'"),
        (loadable, {"split": "dev"}, "cannot open the Hugging Face dataset"),
        (tmp_path / "nowhere", {}, "cannot open the Hugging Face dataset"),
    ):
        with pytest.raises(InputError) as error:
            texts(path, **fields)
        assert expected in str(error.value)
    assert texts(null, skip_bad=True) == ["a"]
    (data,) = (saved / "train").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot open the Hugging Face dataset"):
        texts(saved)


def test_supervised_rows(datasets: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(9)]
    source = HuggingFaceSource(name=str(write_rows(tmp_path / "pairs", rows)), records="supervised")
    pieces = [(piece.text, piece.counts, piece.ends_document) for piece in source.open().pieces()]
    assert pieces[:2] == [("0+1=", False, False), ("1", True, True)]
    assert len(pieces) == 18
    bad = write_rows(tmp_path / "bad", [{"body": "x"}])
    with pytest.raises(InputError, match=r"bad train has neither the field 'messages' nor 'prompt' and 'completion'"):
        HuggingFaceSource(name=str(bad), records="supervised").open()
