"""A run that trains adapters: it resumes exactly, keeps moments of them alone, and is read as the model it makes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mamba_jax
from mamba_jax.checkpoint import load_params
from mamba_jax.config import CheckpointConfig, ExperimentConfig, LoraConfig, TextFolderSource
from mamba_jax.errors import InputError
from mamba_jax.export import __main__ as export
from mamba_jax.export.load import load_model
from mamba_jax.models import parameters
from mamba_jax.models.storage.low_rank import without_adapters
from mamba_jax.report.page import render
from mamba_jax.report.run import read_run
from mamba_jax.run import loop
from mamba_jax.telemetry.events import read_events
from mamba_jax.telemetry.metrics import read_metrics
from tests.runs import Die

MakeConfig = Callable[..., ExperimentConfig]

pytestmark = pytest.mark.usefixtures("shared_step")
LORA = LoraConfig(rank=2)
# Two layers of D 16, E 32, R 2, N 4: (16 + 64) + (32 + 10) + (2 + 32) + (32 + 16) times the rank.
TRAINED = 2 * 2 * (80 + 42 + 34 + 48)


def train(config: ExperimentConfig, **options: Any) -> loop.TrainResult:
    return loop.train(config, devices=jax.devices()[:1], **options)


@pytest.fixture(scope="module")
def base(make_config: MakeConfig) -> ExperimentConfig:
    config = make_config(num_steps=2)
    train(config)
    return config


@pytest.fixture(scope="module")
def place(make_config: MakeConfig, base: ExperimentConfig, corpus: Path) -> MakeConfig:
    def make(**fields: Any) -> ExperimentConfig:
        defaults = {
            "num_steps": 4,
            "init_from": base.train.run_dir,
            "validation": TextFolderSource(path=str(corpus / "validation")),
            "checkpoint": CheckpointConfig(every=2),
            "ema_decay": 0.5,
            "sample_every": 4,
            "sample_tokens": 4,
            "lora": LORA,
        }
        return make_config(**{**defaults, **fields})

    return make


@pytest.fixture(scope="module")
def run(place: MakeConfig) -> ExperimentConfig:
    config = place()
    assert train(config).is_complete
    return config


def losses(config: ExperimentConfig) -> dict[tuple[str, int], str]:
    records = read_metrics(Path(config.train.run_dir))
    return {(str(one["kind"]), int(one["step"])): float(one["loss"]).hex() for one in records}


def test_adapters_alone_are_trained_and_told_of(
    run: ExperimentConfig, base: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    found, before = load_params(run.train.run_dir), load_params(base.train.run_dir).params
    jax.tree.map(np.testing.assert_array_equal, without_adapters(found.stored), before)
    before_mixer, mixer = before["layers"]["mixer"], found.params["layers"]["mixer"]
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert not np.array_equal(mixer[name]["kernel"], before_mixer[name]["kernel"]), name
    np.testing.assert_array_equal(mixer["A_log"], before_mixer["A_log"])
    start = next(event for event in read_events(Path(run.train.run_dir)) if event["event"] == "start")
    count = parameters.count(run.model)
    assert (start["parameters"], start["trained_parameters"]) == (count, TRAINED)
    page = render([read_run(Path(run.train.run_dir))])
    assert f"{TRAINED} ({TRAINED / count:.2%})" in page
    samples = (Path(run.train.run_dir) / "samples.txt").read_text()
    assert samples.startswith("--- step 4")
    assert "no sample" not in capsys.readouterr().out


def test_only_adapters_have_moments(run: ExperimentConfig) -> None:
    (folder,) = (Path(run.train.run_dir) / "checkpoints").glob("4")
    arrays = json.loads((folder / "fingerprints" / "metadata").read_text())["arrays"]
    moments = [name for name in arrays if name.startswith("rest/opt_state") and ("/mu/" in name or "/nu/" in name)]
    assert len(moments) == 2 * 2 * 4
    assert all(name.endswith(("lora_a", "lora_b")) for name in moments)


def test_a_run_of_adapters_resumes_exactly(run: ExperimentConfig, place: MakeConfig, capsys: Any) -> None:
    config = place()
    with pytest.raises(ZeroDivisionError):
        train(config, hooks=Die(ZeroDivisionError(), after=3))
    assert train(config).is_complete
    assert losses(config) == losses(run)
    jax.tree.map(
        np.testing.assert_array_equal, load_params(config.train.run_dir).stored, load_params(run.train.run_dir).stored
    )
    count = parameters.count(run.model)
    told = f"test: {count:,} parameters, trains {TRAINED:,} ({TRAINED / count:.2%} of them) on 1 x cpu"
    assert told in capsys.readouterr().out


def test_the_average_is_that_of_the_adapters(run: ExperimentConfig, base: ExperimentConfig) -> None:
    average = load_params(run.train.run_dir, weights="average")
    before = load_params(base.train.run_dir).params
    jax.tree.map(np.testing.assert_array_equal, without_adapters(average.stored), before)
    kernels = [
        found.params["layers"]["mixer"]["in_proj"]["kernel"] for found in (average, load_params(run.train.run_dir))
    ]
    assert not np.array_equal(*kernels)


def test_loading_and_export_merge_the_adapters(
    run: ExperimentConfig, base: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def export_as(layout: str, *words: str, source: str = run.train.run_dir) -> str:
        arguments = [source, str(tmp_path / layout), "--layout", layout, *words]
        monkeypatch.setattr("sys.argv", ["export", *arguments])
        export.main()
        return capsys.readouterr().out

    export_as("hf")
    told = export_as("peft")
    assert told.startswith("PEFT refuses adapters of out_proj in models of the type 'mamba': to load them there, train")
    expected = load_model(run.train.run_dir).params
    # One more rounding of weights below 1, where the sum is taken in the order of the file.
    for layout, tolerance in (("hf", 0.0), ("peft", 1e-6)):
        found = load_model(tmp_path / layout)
        assert found.tokenizer is not None
        jax.tree.map(
            lambda one, other, atol=tolerance: np.testing.assert_allclose(one, other, rtol=0, atol=atol),
            found.params,
            expected,
        )
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.train.run_dir
    of_run, of_export = (mamba_jax.load(path)([[1, 2, 3]]).logits for path in (run.train.run_dir, tmp_path / "hf"))
    np.testing.assert_array_equal(of_run, of_export)
    with pytest.raises(SystemExit):
        export_as("peft", source=base.train.run_dir)
    with pytest.raises(SystemExit):
        export_as("original", "--base", "x")
    errors = capsys.readouterr().err
    assert "peft exists and is not an empty folder" in errors
    assert "--base is of the layout 'peft', not of 'original': leave it out" in errors


def test_a_run_without_adapters_has_none_to_export(
    base: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["export", base.train.run_dir, str(tmp_path / "out"), "--layout", "peft"])
    with pytest.raises(SystemExit):
        export.main()
    assert "is no training run with lora.rank, so it has no adapters: choose another layout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_branch_has_to_be_told_its_base(
    run: ExperimentConfig, place: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    branch = place(init_from=None, branch_from=f"{run.train.run_dir}@2", num_steps=4)
    assert train(branch).is_complete
    # The same schedule to the end: the same losses.
    assert losses(branch)["train", 4] == losses(run)["train", 4]
    arguments = [branch.train.run_dir, str(tmp_path / "out"), "--layout", "peft"]
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    with pytest.raises(SystemExit):
        export.main()
    assert "does not tell what its adapters belong to: give the folder with --base" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["export", *arguments, "--base", "somewhere"])
    export.main()
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "somewhere"


def refusal(config: ExperimentConfig) -> str:
    with pytest.raises(InputError) as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not Path(config.train.run_dir).exists() or not list(Path(config.train.run_dir).glob("*.jsonl"))
    return str(error.value)


def test_what_cannot_be_is_refused_in_one_line(place: MakeConfig, run: ExperimentConfig) -> None:
    assert refusal(place(lora=LoraConfig(rank=2, targets=("q_proj",)))).startswith(
        "lora.targets: 'q_proj' is found in no projection of this model, which has layers/mixer/dt_proj, "
    )
    with pytest.raises(
        InputError, match=r"^lora.rank=2 trains adapters of weights that are there: give train.init_from$"
    ):
        place(init_from=None)
    with pytest.raises(InputError, match=r"^train.init_optimizer: adapters \(lora.rank=2\) begin anew, with their"):
        place(init_optimizer=True)
    branch = place(init_from=None, branch_from=f"{run.train.run_dir}@2", lora=LoraConfig(rank=4))
    assert "lora.rank was 2, now 4; undo that, or take the weights alone with train.init_from" in refusal(branch)
