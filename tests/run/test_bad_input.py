"""What only a look at files and devices can refuse is refused before anything is computed, and changes no file."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from array_record.python import array_record_module

from mamba_jax.checkpoint import load_params
from mamba_jax.config import (
    CheckpointConfig,
    ExperimentConfig,
    Mamba1Config,
    ShardSource,
    TextFolderSource,
    TokenizerConfig,
)
from mamba_jax.data.shard_index import BLOCK_TOKENS
from mamba_jax.data.shard_writer import ShardWriter
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from mamba_jax.run import loop
from mamba_jax.training.program import TrainProgram

MakeConfig = Callable[..., ExperimentConfig]


def write_shards(folder: Path, ids: np.ndarray) -> None:
    with ShardWriter(folder, ByteTokenizer().vocabulary) as writer:
        writer.add(ids, num_bytes=len(ids), ends_document=True)
        writer.finish()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with good and bad material."""
    (tmp_path / "file").write_text("years of work")
    for name in ("empty", "text", "blank", "binary"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text " * 30)
    (tmp_path / "blank" / "a.txt").write_text("")
    (tmp_path / "binary" / "a.txt").write_bytes(b"\xff\xfe")
    write_shards(tmp_path / "cut", np.arange(256))
    shard = tmp_path / "cut" / "tokens-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    return tmp_path


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"run_dir": "{place}/file/run"}, "cannot write train.run_dir {place}/file/run (Not a directory): make room"),
        ({"run_dir": "{place}/" + 300 * "x"}, "(File name too long): choose another folder"),
        ({"run_dir": "{place}/file"}, "holds no run: choose another folder"),
        ({"run_dir": "{place}/text"}, "holds no run: choose another folder"),
        ({"init_from": "{place}/file"}, "train.init_from: no folder '{place}/file'"),
        (
            {"init_from": "{place}/empty"},
            "{place}/empty is neither a training run (no folder 'checkpoints') nor a model",
        ),
        ({"train": ShardSource(path="{place}/nowhere")}, "cannot read {place}/nowhere/index.json: No such file"),
        ({"train": ShardSource(path="{place}/file")}, "cannot read {place}/file/index.json: Not a directory"),
        ({"train": ShardSource(path="{place}/empty")}, "cannot read {place}/empty/index.json: No such file"),
        ({"train": ShardSource(path="{place}/cut")}, "restore it or prepare the folder again"),
        ({"train": TextFolderSource(path="{place}/nowhere")}, "no text folder '{place}/nowhere'"),
        ({"train": TextFolderSource(path="{place}/file")}, "no text folder '{place}/file'"),
        ({"train": TextFolderSource(path="{place}/empty")}, "no file in {place}/empty matches '**/*.txt'"),
        ({"train": TextFolderSource(path="{place}/blank")}, "a.txt is empty: remove it"),
        ({"train": TextFolderSource(path="{place}/binary")}, "a.txt is not UTF-8 text: invalid start byte at byte 0"),
        ({"train": TextFolderSource(path="x", package="..x")}, "no package '..x' is installed"),
        ({"validation": TextFolderSource(path="{place}/nowhere")}, "no text folder '{place}/nowhere'"),
        ({"train": TextFolderSource(path="{place}/text"), "seq_len": 400}, "301 tokens, fewer than data.seq_len + 1"),
        ({"train": TextFolderSource(path="{place}/text"), "order": "streams", "global_batch": 16}, "a smaller batch"),
        ({"cache_dir": "{place}/file"}, "cannot create token shards in {place}/file: File exists"),
        ({"tokenizer": TokenizerConfig(kind="hf_json", path="{place}/file")}, "is not a tokenizer"),
        ({"sample_prompt": "a\udcff", "sample_every": 5}, "lone surrogate at character 1"),
        ({"sample_prompt": "a\udcff"}, "cannot write train.run_dir"),
        (
            {"mixer": Mamba1Config(scan_implementation="triton")},
            "model.mixer.scan_implementation='triton' cannot run this",
        ),
    ],
)
def test_refused_before_anything_is_computed(
    make_config: MakeConfig, place: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    def filled(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(value, **{name: filled(part) for name, part in vars(value).items()})
        return value.replace("{place}", str(place)) if isinstance(value, str) else value

    config = make_config(**{"cache_dir": str(place / "cache"), **{name: filled(v) for name, v in fields.items()}})
    if config.train.run_dir.startswith(str(place)):
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=filled(fields["run_dir"])))
    monkeypatch.setattr(TrainProgram, "initialize", lambda *args, **kwargs: pytest.fail("parameters were made"))
    before = content(place)
    with pytest.raises(InputError) as error:
        loop.train(config, devices=jax.devices()[:1])
    assert filled(message) in str(error.value)
    assert "\n" not in str(error.value)
    assert {path: data for path, data in content(place).items() if "cache" not in path.parts} == before
    run_dir = Path(config.train.run_dir)
    assert str(run_dir).startswith(str(place)) or not run_dir.exists() or not any(run_dir.iterdir())


def test_unreadable_config_of_a_run(make_config: MakeConfig) -> None:
    config = make_config()
    run_dir = Path(config.train.run_dir)
    run_dir.mkdir()
    for damage in (b"\xff\xfe", b'{"name": 3}', b'{"a":' * 100_000, b'{"seed": 1' + b"0" * 5000 + b"}"):
        (run_dir / "config.json").write_bytes(damage)
        with pytest.raises(InputError, match=r"config\.json: ") as error:
            loop.train(config, devices=jax.devices()[:1])
        assert "\n" not in str(error.value)
        assert (run_dir / "config.json").read_bytes() == damage


def test_bad_token_ends_the_run_and_loses_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    """An id outside the vocabulary never reaches the model; the message says where it is."""
    ids = np.random.default_rng(0).integers(0, 256, size=2 * BLOCK_TOKENS)
    write_shards(tmp_path / "s", ids[:-1])
    ids[BLOCK_TOKENS + 7] = 300
    path = tmp_path / "s" / "tokens-00000.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:3")
    for block in ids.astype("<u2").reshape(2, -1):
        writer.write(block.tobytes())
    writer.close()
    # A foreign writer would take version 1, whose checksums it could make.
    index = json.loads((tmp_path / "s" / "index.json").read_text()) | {"version": 1}
    del index["content"], index["checksum"], index["shards"][0]["digests"]
    index["shards"][0].update(size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    # The stream reaches the second block, of 4096 tokens each, in its 171st step of 24 tokens.
    config = make_config(
        train=ShardSource(path=str(tmp_path / "s")),
        order="streams",
        global_batch=1,
        num_steps=180,
        log_every=50,
        checkpoint=CheckpointConfig(every=100),
    )
    with pytest.raises(InputError, match=r"tokens-00000\.array_record: token 4103 is 300, outside") as error:
        loop.train(config, devices=jax.devices()[:1])
    assert "\n" not in str(error.value)
    assert load_params(config.train.run_dir).step == 100
