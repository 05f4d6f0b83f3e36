"""The command that exports: training runs with their tokenizers, layouts there and back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from mamba_jax.checkpoint import Checkpointer
from mamba_jax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    TextFolderSource,
    TokenizerConfig,
    TrainConfig,
)
from mamba_jax.errors import InputError
from mamba_jax.export import __main__ as command
from mamba_jax.export.load import load_model
from tests.export.conftest import random_model

GOLDEN = Path("tests/golden/mamba1_tiny")


def save_run(folder: Path, tokenizer: TokenizerConfig | None = None, **optimizer: Any) -> tuple[ExperimentConfig, Any]:
    """A checkpoint of step 5, with averaged weights twice the weights."""
    model, params = random_model(vocab_size=257)
    experiment = ExperimentConfig(
        name="test",
        model=model,
        data=DataConfig(
            train=TextFolderSource(path="text"), tokenizer=tokenizer or TokenizerConfig(), seq_len=8, global_batch=1
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3, **optimizer),
        train=TrainConfig(num_steps=5, run_dir=str(folder)),
    )
    items = {"params": jax.tree.map(jnp.asarray, params), "rest": {"step": jnp.asarray(5)}}
    if optimizer:
        items["ema"] = jax.tree.map(lambda leaf: 2 * leaf, items["params"])
    checkpointer = Checkpointer(folder, experiment.checkpoint)
    checkpointer.save(5, items, experiment)
    checkpointer.close()
    return experiment, params


def export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    command.main()


def test_averaged_weights_and_bytes_are_exported(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    _, params = save_run(tmp_path / "run", ema_decay=0.9)
    export(monkeypatch, str(tmp_path / "run"), str(tmp_path / "out"), "--weights", "average")
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert capsys.readouterr().out == f"wrote {', '.join(names)} (hf layout) to {tmp_path / 'out'}\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    loaded = load_model(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.tree.map(lambda leaf: 2 * leaf, params))
    assert loaded.extra["eos_token_id"] == 256
    # Through the other layout and back, the tokenizer comes along and so do the ids of its special tokens.
    export(monkeypatch, str(tmp_path / "out"), str(tmp_path / "original"), "--layout", "original")
    export(monkeypatch, str(tmp_path / "original"), str(tmp_path / "again"))
    for name in set(names) - {"config.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert load_model(tmp_path / "again").extra["eos_token_id"] == 256
    with pytest.raises(SystemExit):
        export(monkeypatch, str(tmp_path / "out"), str(tmp_path / "average"), "--weights", "average")
    assert "is not a training run, so it keeps no average" in capsys.readouterr().err
    assert not (tmp_path / "average").exists()
    with pytest.raises(SystemExit):
        export(monkeypatch, str(GOLDEN), str(tmp_path / "new"), "--layout", "onnx")
    assert (
        "unknown layout 'onnx': choose 'gguf' or 'hf' or 'original' or 'peft' or 'stablehlo'" in capsys.readouterr().err
    )


def test_a_run_that_was_moved_brings_its_tokenizer(tmp_path) -> None:
    """The file that its config names is elsewhere; the one in its folder is taken."""
    end = TokenizerConfig(kind="hf_json", path="nowhere/20B_tokenizer.json", end_of_document="[END]")
    save_run(tmp_path / "run", end)
    assert load_model(tmp_path / "run").tokenizer == end
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    beside = dataclasses.replace(end, path=str(tmp_path / "run" / "tokenizer.json"))
    assert load_model(tmp_path / "run").tokenizer == beside


def test_a_training_run_is_exported_with_its_tokenizer(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[END]": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[END]"])
    tokenizer.save(str(tmp_path / "words.json"))
    words = TokenizerConfig(kind="hf_json", path=str(tmp_path / "words.json"), end_of_document="[END]")
    experiment, params = save_run(tmp_path / "run", words)
    export(monkeypatch, str(tmp_path / "run"), str(tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {content[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {2}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "out").params, params)
    run = load_model(tmp_path / "run", step=5)
    assert run.step == 5
    assert run.experiment == experiment
    with pytest.raises(InputError, match="is not a training run, so it has no step 5"):
        load_model(tmp_path / "out", step=5)
    with pytest.raises(InputError, match="neither a training run"):
        load_model(tmp_path)


def run_export(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mamba_jax.export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_converts_there_and_back(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    original, again = str(tmp_path / "original"), str(tmp_path / "again")
    export(monkeypatch, str(GOLDEN), original, "--layout", "original")
    export(monkeypatch, original, again)
    assert capsys.readouterr().out.count("\n") == 2
    assert (Path(again) / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()


def test_command_line_reports_a_bad_path_in_one_line(tmp_path) -> None:
    done = run_export(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == f"error: no checkpoint folder {tmp_path / 'nowhere'}\n"
