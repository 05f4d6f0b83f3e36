"""A sweep trains every combination once, goes on where it stopped, and shows all."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from mamba_jax import sweep
from mamba_jax.config import ExperimentConfig, TextFolderSource
from mamba_jax.errors import InputError
from mamba_jax.report.run import read_runs
from mamba_jax.run import loop

MakeConfig = Callable[..., ExperimentConfig]


def test_flags_have_any_number_of_values() -> None:
    words = ["--seed", "0", "1", "--optimizer.peak-lr=1e-3", "--model.tie-embeddings", "--mesh.data", "-1"]
    assert sweep.read_flags(words) == {
        "--seed": ["0", "1"],
        "--optimizer.peak-lr": ["1e-3"],
        "--model.tie-embeddings": [],
        "--mesh.data": ["-1"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["7"], "'7' belongs to no flag"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--seed", "1", "1"], "--seed has the value 1 twice"),
        (["--train.run-dir", "x"], "--sweep-dir is the place"),
        (["--sweep-dir"], "takes one folder, got none"),
        (["--seed", "0", "x"], "--seed"),
        (["--seeed", "0", "1"], "did you mean --seed"),
        (["--name", "x"], "leave it out"),
        (["--train.init-from", "a" * 150, "b" * 210], "too long for a folder's name"),
    ],
)
def test_bad_flags_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        sweep.plan("configs/quickstart.py", words)
    assert "\n" not in str(error.value)


def test_folders_say_what_is_varied(tmp_path: Path) -> None:
    words = ["--seed", "0", "1", "--optimizer.schedule.final-lr", "1e-5", "2e-5", "--sweep-dir", str(tmp_path)]
    trials = sweep.plan("configs/quickstart.py", words)
    assert [trial.folder.name for trial in trials] == [
        "seed=0,final-lr=1e-5",
        "seed=0,final-lr=2e-5",
        "seed=1,final-lr=1e-5",
        "seed=1,final-lr=2e-5",
    ]
    assert trials[3].config.optimizer.schedule.final_lr == 2e-5
    (alone,) = sweep.plan("configs/quickstart.py", ["--seed", "3"])
    assert (alone.folder, alone.config.seed) == (Path("runs/quickstart_sweep/quickstart"), 3)


@pytest.mark.usefixtures("shared_step")
def test_a_sweep_goes_on_and_shows_all(
    make_config: MakeConfig,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One run is bad and leaves the others alone; of two starts, the second trains what the first did not."""
    config = make_config(num_steps=2, validation=TextFolderSource(path=str(corpus / "validation")))
    trained: list[str] = []

    def train(config: ExperimentConfig, **options: Any) -> loop.TrainResult:
        trained.append(config.name)
        if len(trained) == 2:
            return loop.TrainResult(step=0, is_complete=False, stop_signal=15, loss=None, validation=None)
        return real(config, devices=jax.devices()[:1], **options)

    real = loop.train
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(sweep.watchdog, "end_within", lambda _: None)
    # Each config as the flags ask, in place of a file.
    values = {"0": config, "1": dataclasses.replace(config, seed=1)}
    values["bad"] = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=3))
    monkeypatch.setattr(sweep, "load_config", lambda _, words, model_for: values[words[1]])
    words = ["CONFIG", "--seed", "0", "1", "bad", "--sweep-dir", str(tmp_path / "all")]
    assert sweep._main(words, "sweep") == 128 + 15
    assert trained == ["seed=0", "seed=1"]
    assert "not begun" in capsys.readouterr().out

    assert sweep._main(words, "sweep") == 2
    assert trained[2:] == ["seed=1", "seed=bad"]
    printed = capsys.readouterr()
    assert "run 1 of 3, seed=0: finished before" in printed.out
    assert "seed=bad failed: model.vocab_size is 3" in printed.err
    header, *rows = printed.out.splitlines()[-5:-1]
    assert header.split() == ["seed", "loss", "held-out", "bits/byte", "status"]
    assert {row.split()[0] for row in rows[:2]} == {"0", "1"}
    assert float(rows[0].split()[2]) <= float(rows[1].split()[2])
    assert rows[2].split() == ["bad", "failed"]
    assert [run.name for run in read_runs(tmp_path / "all")] == ["seed=0", "seed=1"]
    assert f"wrote {tmp_path / 'all' / 'report.html'} and {tmp_path / 'all' / 'sweep.png'}" in printed.out
    assert (tmp_path / "all" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "all" / "report.html").read_text()
    assert "seed=0" in page
    assert "seed=1" in page
