"""Configs survive JSON unchanged, and every kind of mistake gets one line that names it."""

import dataclasses
from pathlib import Path

import pytest

from mamba_jax import config as c
from mamba_jax.cli import load_config, one_line_errors
from mamba_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def make_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        name="test",
        model=c.ModelConfig(vocab_size=257, d_model=64, num_layers=2),
        data=c.DataConfig(train=c.TextFolderSource(path="text"), seq_len=16, global_batch=4),
        optimizer=c.OptimizerConfig(peak_lr=1e-3, schedule=c.WarmupStableDecaySchedule()),
        train=c.TrainConfig(num_steps=3, run_dir="runs/test"),
    )


def test_json_round_trip() -> None:
    config = make_config()
    assert c.from_json(c.ExperimentConfig, c.to_json(config), origin="f") == config


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"d_model": 64', '"d_modle": 64', "did you mean 'd_model'?"),
        ('"d_model": 64', '"d_model": "wide"', "model.d_model: Input should be a valid integer, got 'wide'"),
        ('"d_model": 64', '"d_model": "64"', "model.d_model: Input should be a valid integer, got '64'"),
        ('"d_model": 64', '"d_model": -1', "ModelConfig.d_model must be positive, got -1"),
        ('"num_steps": 3,', "", "missing key 'train.num_steps'"),
        ('"text_folder"', '"text_fodler"', "does not match any of the expected tags"),
        ('"accumulation_steps": 1', '"accumulation_steps": 3', "must be divisible by train.accumulation_steps (3)"),
        ('"seed": 0,', '"seed": 0', "Invalid JSON"),
    ],
)
def test_json_mistakes_get_one_line(old: str, new: str, expected: str) -> None:
    text = c.to_json(make_config())
    assert old in text
    with pytest.raises(InputError) as raised:
        c.from_json(c.ExperimentConfig, text.replace(old, new), origin="run/config.json")
    message = str(raised.value)
    assert message.startswith("run/config.json: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "build",
    [
        lambda: c.Mamba1Config(dt_min=0.2, dt_max=0.1),
        lambda: c.Mamba1Config(selective=("dt", "dt")),
        lambda: c.TokenizerConfig(kind="hf_json"),
        lambda: c.TokenizerConfig(path="x.json"),
        lambda: c.MeshConfig(data=-1, fsdp=-1),
        lambda: c.WarmupStableDecaySchedule(warmup_fraction=0.6, decay_fraction=0.6),
        lambda: c.OptimizerConfig(peak_lr=0.0),
        lambda: c.EvaluationConfig(batch_size=0),
    ],
)
def test_impossible_values_are_refused(build) -> None:
    with pytest.raises(InputError):
        build()


def test_derived_sizes() -> None:
    model = c.ModelConfig(vocab_size=50277, d_model=768, num_layers=24)
    assert (model.padded_vocab_size, model.d_inner, model.dt_rank) == (50280, 1536, 48)
    assert dataclasses.replace(model, mixer=c.Mamba1Config(dt_rank=7)).dt_rank == 7


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.py"
    path.write_text(
        "from mamba_jax.config import *\n"
        "def get_config():\n"
        f"    return from_json(ExperimentConfig, {c.to_json(make_config())!r}, origin='inline')\n"
    )
    return str(path)


def test_overrides_change_single_fields(config_file: str) -> None:
    config = load_config(config_file, ["--train.num-steps", "7", "--model.mixer.selective", "dt", "C"])
    assert config.train.num_steps == 7
    assert config.model.mixer.selective == ("dt", "C")
    assert config.data == make_config().data


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--train.num-stepz", "7"], "did you mean --train.num-steps?"),
        (["--train.num-steps", "many"], "--train.num-steps"),
        (["--model.d-model", "-3"], "ModelConfig.d_model must be positive, got -3"),
        (["--train.num-steps"], "Missing value for argument '--train.num-steps'"),
    ],
)
def test_bad_flags_get_one_line_and_status_2(config_file: str, flags: list[str], expected: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        load_config(config_file, flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_missing_and_wrong_config_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config file 'nowhere\.py'"):
        load_config("nowhere.py", [])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="defines no get_config"):
        load_config(str(tmp_path / "empty.py"), [])
    (tmp_path / "wrong.py").write_text("def get_config():\n    return 3\n")
    with pytest.raises(InputError, match="returned int, expected ExperimentConfig"):
        load_config(str(tmp_path / "wrong.py"), [])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_committed_configs_load(path: Path) -> None:
    config = load_config(str(path), [])
    assert c.from_json(c.ExperimentConfig, c.to_json(config), origin=path.name) == config
