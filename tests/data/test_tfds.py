"""TensorFlow Datasets without TensorFlow: local sets by name and by folder, published sets mocked."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mamba_jax.config import DataConfig, TfdsSource
from mamba_jax.data.pipeline import open_source
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from tests.data.conftest import open_tokens

TEXTS = [f"document {i}, é" * (i + 1) for i in range(9)] + [""]


class MambaJaxTestText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "number": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, text in enumerate(TEXTS):
            yield i, {"text": text, "number": i}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("tfds")
    MambaJaxTestText(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture(autouse=True)
def tensorflow_stays_out() -> Iterator[None]:
    yield
    assert "tensorflow" not in sys.modules


def texts(source: TfdsSource) -> list[str]:
    return [piece.text for piece in source.open().pieces()]


@pytest.mark.parametrize("by_name", [True, False])
def test_local_set(prepared: Path, by_name: bool) -> None:
    folder = str(prepared / "mamba_jax_test_text" / "1.0.0")
    fields: dict[str, Any] = {"name": "mamba_jax_test_text", "data_dir": str(prepared)} if by_name else {"name": folder}
    assert sorted(texts(TfdsSource(split="train", **fields))) == sorted(filter(None, TEXTS))
    assert texts(TfdsSource(split="train[50%:]", **fields)) == texts(TfdsSource(split="train[5:]", **fields))


def test_open_source_tokenises_once_and_again_after_a_change(
    prepared: Path, tmp_path: Path, make_config: Callable[..., DataConfig]
) -> None:
    folder = tmp_path / "copy" / "1.0.0"
    shutil.copytree(prepared / "mamba_jax_test_text" / "1.0.0", folder)
    source, config, tokenizer = TfdsSource(name=str(folder), split="train"), make_config(), ByteTokenizer()
    dataset = open_tokens(source, config.cache_dir, tokenizer)
    assert dataset.num_documents == len(TEXTS) - 1
    assert dataset.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert dataset.num_tokens == dataset.num_bytes + dataset.num_documents
    ids = dataset.read(np.array([0]), length=dataset.num_tokens)[0]
    decoded = [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]
    assert decoded == texts(source)
    open_source(source, config.cache_dir, tokenizer)
    assert len(list(Path(config.cache_dir).iterdir())) == 1
    (folder / "dataset_info.json").touch()
    open_source(source, config.cache_dir, tokenizer)
    assert len(list(Path(config.cache_dir).iterdir())) == 2


@pytest.mark.parametrize("name", ["lm1b", "c4/en", "imdb_reviews", "winogrande"])
def test_published_names(name: str) -> None:
    """c4 and winogrande are among the sets that TFDS finds only once their module is imported."""
    field = "sentence" if name == "winogrande" else "text"
    with tfds.testing.mock_data(num_examples=5):
        found = texts(TfdsSource(name=name, split="train", text_field=field))
    assert len(found) == 5
    assert all(found)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "lm1bb"}, "TFDS knows no set 'lm1bb'; did you mean 'lm1b'?"),
        ({"name": "wikipedai/20230601.en"}, "did you mean 'wikipedia'?"),
        ({"name": "no such set, at all"}, "no such set"),
        ({"name": "c4/enn"}, "cannot open TFDS set 'c4/enn': .*BuilderConfig enn not found"),
        ({"split": "trian"}, r"cannot give split 'trian' \(it has: train\)"),
        ({"split": "train[:5"}, r"cannot give split 'train\[:5'"),
        ({"split": "train[:0]"}, r"cannot give split 'train\[:0\]'"),
        ({"text_field": "txt"}, "has no feature 'txt': set text_field to one of number, text"),
        ({"text_field": "number"}, "feature 'number' of TFDS set .* is not text but"),
    ],
)
def test_mistakes_get_one_line(prepared: Path, fields: dict[str, Any], expected: str) -> None:
    defaults: dict[str, Any] = {"name": "mamba_jax_test_text", "split": "train", "data_dir": str(prepared)}
    with pytest.raises(InputError, match=expected) as raised:
        texts(TfdsSource(**{**defaults, **fields}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "is empty"),
        ([{"text": b""}], "every 'text' of TFDS set lm1b/1.1.0 train is empty"),
        ([{"text": "fine"}, {"text": b"abc\xff"}], "record 1 of .* is not UTF-8 text: invalid start byte at 3"),
        ([{"text": "\ud800"}], "record 0 of .* is not UTF-8 text: surrogates not allowed at 0"),
    ],
)
def test_bad_records_get_one_line(records: list[dict[str, Any]], expected: str) -> None:
    with (
        tfds.testing.mock_data(as_data_source_fn=lambda *args, **kwargs: records),
        pytest.raises(InputError, match=expected),
    ):
        texts(TfdsSource(name="lm1b", split="train"))


def test_folder_without_a_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a prepared TFDS set; name the version folder"):
        texts(TfdsSource(name=str(tmp_path), split="train"))


def edited(prepared: Path, target: Path, name: str, edit: Callable[[Any], object]) -> TfdsSource:
    """A copy of the set, one of whose JSON files is edited."""
    shutil.copytree(prepared / "mamba_jax_test_text" / "1.0.0", target)
    content = json.loads((target / name).read_text())
    new = edit(content)
    (target / name).write_text(new if isinstance(new, str) else json.dumps(content))
    return TfdsSource(name=str(target), split="train")


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_set_runs_no_code(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, by_name: bool
) -> None:
    (tmp_path / "code_of_a_set.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))

    def edit(content: dict[str, Any]) -> None:
        text = content["featuresDict"]["features"]["text"]
        del text["pythonClassName"]
        text[key] = "code_of_a_set.Text"
        if key == "type":
            content.clear()
            content.update(type="code_of_a_set.Text", content={})

    source = edited(prepared, tmp_path / "my_copied_set" / "1.0.0", "features.json", edit)
    if by_name:
        source = TfdsSource(name="my_copied_set", split="train", data_dir=str(tmp_path))
    with pytest.raises(
        InputError, match=r"names 'code_of_a_set\.Text', which is not a class of TFDS and is not imported"
    ):
        source.open()


@pytest.mark.parametrize("name", ["user:set", "huggingface:c4/en", "kaggle:set:1.0.0"])
def test_sets_of_others_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"TFDS set '{name}' is not one of TFDS itself, and code from elsewhere"):
        TfdsSource(name=name, split="train").open()


@pytest.mark.parametrize("name", ["os.path", "../text", "", "lm1b x\n", "\udcff", "x" * 5000])
def test_names_that_are_none_get_one_line(name: str) -> None:
    with pytest.raises(InputError) as raised:
        TfdsSource(name=name, split="train").open()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 2100


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("dataset_info.json", lambda content: "[" * 100_000),
        ("dataset_info.json", lambda content: '{"name": ' * 100_000),
        ("dataset_info.json", lambda content: ""),
        ("dataset_info.json", lambda content: "[]"),
        ("dataset_info.json", lambda content: content.update(name=[{}])),
        ("dataset_info.json", lambda content: content.update(version="one")),
        ("dataset_info.json", lambda content: content.update(fileFormat="parkay")),
        ("dataset_info.json", lambda content: content.update(splits=3)),
        ("dataset_info.json", lambda content: content["splits"][0].update(shardLengths=["9" * 30])),
        ("dataset_info.json", lambda content: content["splits"][0].update(shardLengths=["11"])),
        ("dataset_info.json", lambda content: content["splits"][0].update(filepathTemplate="{X}")),
        ("features.json", lambda content: "{" * 1000),
        ("features.json", lambda content: content.clear()),
        ("features.json", lambda content: content.update(featuresDict=7)),
        ("features.json", lambda content: content.update(pythonClassName="tensorflow_datasets.no_such.Feature")),
    ],
)
def test_damaged_sets_get_one_line(prepared: Path, tmp_path: Path, file: str, edit: Callable[[Any], object]) -> None:
    with pytest.raises(InputError) as raised:
        texts(edited(prepared, tmp_path / "1.0.0", file, edit))
    assert str(raised.value).isprintable()


def test_damaged_records_get_one_line(prepared: Path, tmp_path: Path) -> None:
    source = edited(prepared, tmp_path / "1.0.0", "features.json", lambda content: None)
    (records,) = (tmp_path / "1.0.0").glob("*.array_record*")
    data = bytearray(records.read_bytes())
    data[len(data) // 2] ^= 1
    for damage in (bytes(data), data[:1000], b""):
        records.write_bytes(damage)
        with pytest.raises(InputError) as raised:
            texts(source)
        assert str(raised.value).isprintable()
    records.unlink()
    with pytest.raises(InputError):
        texts(source)


def test_a_pipe_in_place_of_a_set_is_not_waited_for(prepared: Path, tmp_path: Path) -> None:
    source = edited(prepared, tmp_path / "1.0.0", "features.json", lambda content: None)
    for name in ("features.json", "dataset_info.json"):
        (tmp_path / "1.0.0" / name).unlink()
        os.mkfifo(tmp_path / "1.0.0" / name)
        with pytest.raises(InputError, match=f"{name} is not a file"):
            source.open()


def test_failing_preparation_says_how_to_prepare_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(MambaJaxTestText, "download_and_prepare", fail)
    with pytest.raises(InputError, match=r"could not be prepared here: no network; .*--file_format=array_record"):
        texts(TfdsSource(name="mamba_jax_test_text", split="train", data_dir=str(tmp_path)))


def test_set_stored_as_tfrecord_is_refused(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "1.0.0"
    shutil.copytree(prepared / "mamba_jax_test_text" / "1.0.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="is stored as tfrecord, which needs TensorFlow"):
        texts(TfdsSource(name=str(folder), split="train"))
