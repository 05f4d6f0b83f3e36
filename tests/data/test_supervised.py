"""Of supervised records completions alone count, on their way to the loss and in it; bad records get one line."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mamba_jax.config import DataConfig, FilesSource, TokenizerConfig
from mamba_jax.data.batches import Task
from mamba_jax.data.config import MixturePart, MixtureSource
from mamba_jax.data.mixture import Mixture
from mamba_jax.data.pipeline import TrainBatches, evaluation_batches, open_data, train_batches
from mamba_jax.data.prepare import main as prepare
from mamba_jax.data.prepare import write_shards
from mamba_jax.data.shard_writer import ShardWriter
from mamba_jax.data.shards import COUNTS, ENDS, TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer, make_tokenizer
from mamba_jax.errors import InputError
from tests.data.conftest import open_tokens
from tests.data.small_tokenizers import small
from tests.data.test_pipeline import join

END = 256
PAIRS = [
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": "", "completion": "héllo"},
    {"prompt": "capital of France? ", "completion": "Paris"},
]


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_all(dataset: TokenDataset) -> tuple[list[int], list[int]]:
    """Ids and flags of the stream."""
    ids, flags = dataset.read_flagged(np.array([0]), length=dataset.num_tokens)
    assert dataset.read(np.array([0]), length=dataset.num_tokens).tolist() == ids.tolist()
    return ids[0].tolist(), flags[0].tolist()


def counted(dataset: TokenDataset) -> list[bytes]:
    """The bytes that count, of each document; an end-of-document token is a NUL."""
    ids, flags = read_all(dataset)
    documents, current = [], b""
    for token, flag in zip(ids, flags, strict=True):
        if flag & COUNTS:
            current += b"\0" if token == END else bytes([token])
        if flag & ENDS:
            documents.append(current)
            current = b""
    return documents


def supervised(path: str, **fields: Any) -> FilesSource:
    return FilesSource(path=path, records="supervised", **fields)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_completions_and_the_end_behind_them_count(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"pairs{suffix}")
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    else:
        write_lines(Path(path), PAIRS)
    dataset = open_tokens(supervised(path), str(tmp_path / "cache"), ByteTokenizer())
    assert counted(dataset) == [b"4\0", "héllo\0".encode(), b"Paris\0"]
    ids, _ = read_all(dataset)
    text = b"".join((pair["prompt"] + pair["completion"]).encode() + b"\0" for pair in PAIRS)
    assert bytes(0 if token == END else token for token in ids) == text
    assert dataset.num_documents == 3
    assert dataset.num_bytes == len(text) - 3
    assert dataset.index.version == 3


def test_a_prompt_has_the_ids_that_it_has_when_the_model_is_asked(tmp_path: Path) -> None:
    """A token over the end of the prompt would be one that no prompt ends in."""
    (tmp_path / "tokenizer.json").write_text(small("byte_level_prefix"))
    tokenizer = make_tokenizer(TokenizerConfig(kind="hf_json", path=str(tmp_path / "tokenizer.json")))
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "the st", "completion": "ate of the union"}])
    ids, flags = read_all(open_tokens(supervised(path), str(tmp_path / "cache"), tokenizer))
    prompt = tokenizer.encode("the st").tolist()
    assert ids[: len(prompt)] == prompt
    assert [flag & COUNTS for flag in flags] == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids).strip() == "the state of the union"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "has neither the field 'messages' nor 'prompt' and 'completion', but 'text'"),
        ({}, "has neither the field 'messages' nor 'prompt' and 'completion', but none at all"),
        ({"prompt": "a"}, "has no field 'completion'"),
        ({"completion": "a"}, "has no field 'prompt'"),
        ({"prompt": "a", "completion": 4}, "has no text but int in its field 'completion'"),
        ({"prompt": "a", "completion": " \n"}, r"has an empty completion, ' \\n': there is nothing to learn"),
        ({"prompt": "a\ud800", "completion": "b"}, "holds a lone surrogate at character 1 of 'prompt'"),
        ({"messages": []}, r"has no list of messages in its field 'messages' but \[\]"),
        ({"messages": "hi"}, "has no list of messages in its field 'messages' but 'hi'"),
    ],
)
def test_records_of_neither_kind_are_refused_in_one_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [PAIRS[0], record])
    with pytest.raises(InputError, match=f"a.jsonl line 2 {message}") as caught:
        open_data(supervised(path), tmp_path / "cache", ByteTokenizer())
    assert "\n" not in str(caught.value)
    dataset = open_tokens(supervised(path, skip_bad=True), str(tmp_path / "cache"), ByteTokenizer())
    assert counted(dataset) == [b"4\0"]


def test_text_files_and_fields_of_text_do_not_go_with_supervised_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"a\.txt is text, and records='supervised' reads JSON lines and parquet"):
        open_data(supervised(str(tmp_path)), tmp_path / "cache", ByteTokenizer())
    with pytest.raises(InputError, match="records='supervised' reads prompt and completion, or messages: leave"):
        supervised("a", text_field="body")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has neither the field 'messages' nor 'prompt' and 'completion'"):
        open_data(supervised(str(tmp_path / "a.parquet")), tmp_path / "cache", ByteTokenizer())


def long_pairs(tmp_path: Path, count: int = 800) -> str:
    rng = np.random.default_rng(0)
    pairs = [
        {"prompt": "p" * int(rng.integers(0, 40)), "completion": "c" * int(rng.integers(1, 30))} for _ in range(count)
    ]
    return write_lines(tmp_path / "long.jsonl", pairs)


def test_flags_pass_through_shards_of_several_files_and_a_copy_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = long_pairs(tmp_path)
    out = tmp_path / "shards"
    flags = ["--files", path, "--records", "supervised", "--output", str(out), "--shard-tokens", "8192"]
    monkeypatch.setattr("sys.argv", ["prepare", *flags, "--deduplicate", "exact"])
    prepare()
    dataset = TokenDataset(out)
    dataset.check()
    assert len(dataset.index.shards) > 2
    ids, flagged = read_all(dataset)
    for token, flag in zip(ids, flagged, strict=True):
        # The completion and the end of document behind it.
        assert bool(flag & COUNTS) == (token != ord("p"))
        assert bool(flag & ENDS) == (token == END)
    lines = set(Path(path).read_text().splitlines())
    assert dataset.num_documents == len(lines) < 800


def test_processes_and_a_writer_that_was_interrupted_write_the_same_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = long_pairs(tmp_path)
    (tmp_path / "tokenizer.json").write_text(small("byte_level"))
    tokenizer = make_tokenizer(TokenizerConfig(kind="hf_json", path=str(tmp_path / "tokenizer.json")))

    def write(name: str, workers: int) -> dict[str, bytes]:
        write_shards(supervised(path).open(), tokenizer, tmp_path / name, shard_tokens=4096, workers=workers)
        return {file.name: file.read_bytes() for file in sorted((tmp_path / name).iterdir())}

    monkeypatch.setattr("mamba_jax.data.prepare._BATCH_BYTES", 2000)
    whole = write("whole", 1)
    assert len(whole) > 3
    keep = ShardWriter._keep

    def stop(writer: ShardWriter) -> None:
        keep(writer)
        raise InputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_keep", stop)
        with pytest.raises(InputError, match="stopped"):
            write("out", 1)
    monkeypatch.setattr("mamba_jax.data.tokenization.stream._ALONE_BYTES", 1)
    assert write("out", 2) == whole


def test_batches_count_completions_only_in_training_mixtures_and_evaluation(tmp_path: Path) -> None:
    source = supervised(long_pairs(tmp_path))
    (tmp_path / "plain.txt").write_text("all of this text counts " * 40)
    mixed = MixtureSource(
        parts=(
            MixturePart(name="pairs", source=source),
            MixturePart(name="plain", source=FilesSource(path=str(tmp_path / "plain.txt"))),
        )
    )
    config = DataConfig(train=mixed, seq_len=50, global_batch=4, cache_dir=str(tmp_path / "cache"))
    mixture = open_data(mixed, config.cache_dir, ByteTokenizer())
    assert isinstance(mixture, Mixture)
    pairs = mixture.parts[0].dataset
    for batch in (TrainBatches(pairs, config, seed=0).at(3), train_batches(mixture, config, seed=0).at(3)):
        tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
        np.testing.assert_array_equal(batch.loss_mask, (targets != ord("p")) & (tokens != END))
    assert not isinstance(pairs, Task)
    whole = join(list(evaluation_batches(pairs, seq_len=50, documents="packed", batch_size=4)))
    ids, flags = read_all(pairs)
    assert np.sum(whole.loss_mask) == sum(
        bool(flag & COUNTS) and not before & ENDS for before, flag in itertools.pairwise(flags)
    )
    assert len(ids) > 10_000


def test_streams_go_on_by_flags(tmp_path: Path) -> None:
    source = supervised(long_pairs(tmp_path))
    config = DataConfig(train=source, seq_len=16, global_batch=2, order="streams", cache_dir=str(tmp_path / "cache"))
    dataset = open_tokens(source, config.cache_dir, ByteTokenizer())
    batches = TrainBatches(dataset, config, seed=0)
    for step in range(1, 40):
        last = np.asarray(batches.at(step - 1).tokens)[:, -1]
        np.testing.assert_array_equal(batches.at(step).continues, last != END)
