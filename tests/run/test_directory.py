"""Which run a folder holds, what may go on there, and what begins again."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from mamba_jax.checkpoint import load_params
from mamba_jax.config import CheckpointConfig, ExperimentConfig, TextFolderSource
from mamba_jax.data.batch import LMBatch
from mamba_jax.errors import InputError
from mamba_jax.export import huggingface
from mamba_jax.models import parameters
from mamba_jax.run import loop
from mamba_jax.run.hooks import Hooks
from mamba_jax.run.loop import TrainResult
from mamba_jax.run.ownership import LOCK
from mamba_jax.telemetry.metrics import read_metrics
from mamba_jax.training.program import TrainProgram
from tests.runs import Die

MakeConfig = Callable[..., ExperimentConfig]

pytestmark = pytest.mark.usefixtures("shared_step")


def train(config: ExperimentConfig, **options: Any) -> TrainResult:
    return loop.train(config, devices=jax.devices()[:1], **options)


def losses(config: ExperimentConfig) -> dict[int, str]:
    found = [record for record in read_metrics(Path(config.train.run_dir)) if record["kind"] == "train"]
    by_step = {record["step"]: float(record["cross_entropy"]).hex() for record in found}
    assert len(by_step) == len(found)
    return by_step


def refusal(config: ExperimentConfig, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        train(config, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A run of four steps, saved at each second one, whose text may be changed."""
    text = tmp_path_factory.mktemp("text") / "train"
    shutil.copytree(corpus / "train", text)
    config = make_config(
        train=TextFolderSource(path=str(text)), num_steps=4, checkpoint=CheckpointConfig(every=2), seed=3
    )
    assert train(config).is_complete
    return config


@pytest.fixture
def saved(finished: ExperimentConfig, tmp_path: Path) -> ExperimentConfig:
    """A copy of it as it was after two steps and a kill in the fourth."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished.train.run_dir, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "4")
    return dataclasses.replace(finished, train=dataclasses.replace(finished.train, run_dir=str(run_dir)))


@pytest.mark.parametrize("change", ["edited", "appended", "added", "removed"])
def test_other_text_under_the_same_name_is_another_run(saved: ExperimentConfig, tmp_path: Path, change: str) -> None:
    assert isinstance(saved.data.train, TextFolderSource)
    text = tmp_path / "text"
    shutil.copytree(saved.data.train.path, text)
    first = text / "0.txt"
    if change == "edited":
        first.write_text(first.read_text().replace("s", "z"))
    elif change == "appended":
        first.write_text(first.read_text() + "more")
    elif change == "added":
        (text / "new.txt").write_text("more")
    else:
        first.unlink()
    place = Path(saved.data.train.path)
    place.rename(tmp_path / "away")
    try:
        text.rename(place)
        before = losses(saved)
        message = refusal(saved)
    finally:
        shutil.rmtree(place)
        (tmp_path / "away").rename(place)
    assert "data.train is not what the run in" in message
    assert ("documents was 12, now" in message) == (change in ("added", "removed"))
    assert losses(saved) == before


def test_touched_text_and_lost_files_go_on(saved: ExperimentConfig, finished: ExperimentConfig, corpus: Path) -> None:
    """Every checkpoint holds config and identity; held-out text is not part of either."""
    run_dir = Path(saved.train.run_dir)
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "config.json").write_text("")
    (run_dir / "run.json").unlink()
    assert isinstance(saved.data.train, TextFolderSource)
    for path in Path(saved.data.train.path).iterdir():
        os.utime(path)
    validation = TextFolderSource(path=str(corpus / "validation"))
    assert train(dataclasses.replace(saved, data=dataclasses.replace(saved.data, validation=validation))).is_complete
    assert losses(saved) == losses(finished)
    assert json.loads((run_dir / "run.json").read_text()) == record | {"saved": 4}


def test_checkpoint_of_another_run_is_refused(saved: ExperimentConfig, make_config: MakeConfig) -> None:
    """Its arrays would fit, and so would its config."""
    path = Path(saved.train.run_dir) / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"run": "0" * 32}))
    assert "another run" in refusal(saved)


def test_checkpoint_with_another_config_is_refused(saved: ExperimentConfig) -> None:
    """An edited config.json does not make it another run."""
    path = Path(saved.train.run_dir) / "config.json"
    path.write_text(path.read_text().replace('"peak_lr": 0.01', '"peak_lr": 0.5'))
    changed = dataclasses.replace(saved, optimizer=dataclasses.replace(saved.optimizer, peak_lr=0.5))
    assert "optimizer.peak_lr was 0.01, now 0.5" in refusal(changed)


@pytest.mark.parametrize("loss", ["checkpoints are gone", "a checkpoint was damaged", "run.json is gone too"])
def test_saved_run_does_not_begin_again_unless_told_to(
    saved: ExperimentConfig, finished: ExperimentConfig, loss: str
) -> None:
    run_dir, before = Path(saved.train.run_dir), losses(saved)
    if loss == "a checkpoint was damaged":
        (run_dir / "damaged").mkdir()
        (run_dir / "checkpoints" / "2").rename(run_dir / "damaged" / "2")
        (run_dir / "events.jsonl").unlink()
        (run_dir / "run.json").unlink()
    else:
        shutil.rmtree(run_dir / "checkpoints")
    if loss == "run.json is gone too":
        (run_dir / "run.json").unlink()
    for _ in range(2):
        assert "pass --from-scratch" in refusal(saved)
    assert losses(saved) == before
    assert train(saved, from_scratch=True).is_complete
    assert losses(saved) == losses(finished)
    aside = dataclasses.replace(saved, train=dataclasses.replace(saved.train, run_dir=str(run_dir / "before-1")))
    assert losses(aside) == before
    assert (run_dir / "before-1" / "config.json").is_file()


def test_from_scratch_takes_another_config_and_keeps_the_checkpoints(saved: ExperimentConfig) -> None:
    other = dataclasses.replace(saved, seed=4)
    assert "seed was 3, now 4" in refusal(other)
    run_dir = Path(saved.train.run_dir)
    (run_dir / "export").mkdir()
    assert train(other, from_scratch=True).is_complete
    assert load_params(run_dir / "before-1").step == 2
    assert load_params(run_dir).config.seed == 4
    assert (run_dir / "export").is_dir()


def test_killed_before_its_first_checkpoint_begins_again(finished: ExperimentConfig, make_config: MakeConfig) -> None:
    """Nobody need be there; but another config would mix the records of two runs."""
    config = make_config(train=finished.data.train, num_steps=4, checkpoint=CheckpointConfig(every=3), seed=3)
    for last in (1, 2):
        with pytest.raises(ZeroDivisionError):
            train(config, hooks=Die(ZeroDivisionError(), after=last))
        assert max(losses(config)) == last
    assert "seed was 3, now 5" in refusal(dataclasses.replace(config, seed=5))
    assert train(config).is_complete
    assert losses(config) == losses(finished)


def test_checkpoints_on_another_disk(make_config: MakeConfig, finished: ExperimentConfig, tmp_path: Path) -> None:
    """A link to it, what its file system puts there, and what people do."""
    config = make_config(train=finished.data.train, num_steps=4, checkpoint=CheckpointConfig(every=2), seed=3)
    run_dir, disk = Path(config.train.run_dir), tmp_path / "disk"
    run_dir.mkdir()
    (run_dir / "lost+found").mkdir()
    (run_dir / "checkpoints").symlink_to(disk)
    assert f"is a link to {disk}, which is not there" in refusal(config)
    (disk / "lost+found").mkdir(parents=True)
    assert train(config).is_complete
    assert losses(config) == losses(finished)
    assert (disk / "4").is_dir()
    (disk / "notes").mkdir()
    (disk / "notes.txt").write_text("")
    assert train(config).step == 4
    assert train(config, from_scratch=True).is_complete
    assert load_params(run_dir / "before-1").step == load_params(run_dir).step == 4
    assert (run_dir / "checkpoints").is_symlink()


@pytest.mark.parametrize("kind", ["dangling link", "fifo as config", "foreign config", "line break", "not UTF-8"])
def test_odd_folders(saved: ExperimentConfig, tmp_path: Path, kind: str) -> None:
    def at(run_dir: Path) -> ExperimentConfig:
        return dataclasses.replace(saved, train=dataclasses.replace(saved.train, run_dir=str(run_dir)))

    if kind == "dangling link":
        (tmp_path / "link").symlink_to("nowhere")
        assert "link is a link to nowhere, which is not there" in refusal(at(tmp_path / "link"))
    elif kind == "fifo as config":
        path = Path(saved.train.run_dir) / "config.json"
        path.unlink()
        os.mkfifo(path)
        assert train(saved).is_complete
        assert path.is_file()
    elif kind == "foreign config":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
        for from_scratch in (False, True):
            assert "unknown key 'model_type'" in refusal(at(tmp_path / "model"), from_scratch=from_scratch)
        assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    elif kind == "line break":
        assert "has a line break, another control character or a backslash in it" in refusal(at(tmp_path / "a\nb"))
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    else:
        assert "has bytes that are not UTF-8" in refusal(at(tmp_path / os.fsdecode(b"\xff")))
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Call(Hooks):
    """Calls a function before a step."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def before_step(self, step: int, batch: LMBatch) -> LMBatch:
        self._function()
        return batch


@pytest.mark.parametrize("place", ["parameters", "compilation", "first step", "host"])
def test_out_of_memory_is_one_line_and_claims_nothing(
    finished: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    config = dataclasses.replace(finished, train=dataclasses.replace(finished.train, run_dir=str(tmp_path / "run")))

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError if place == "host" else jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nof 9")

    with monkeypatch.context() as patch:
        if place == "compilation":
            patch.setattr(jax.stages.Lowered, "compile", full)
        elif place != "first step":
            patch.setattr(TrainProgram, "initialize", full)
        message = refusal(config, hooks=Call(full) if place == "first step" else None)
    assert message.startswith("out of memory while ")
    assert "data.global_batch" in message
    # Whatever is changed; this needs no other program.
    assert train(dataclasses.replace(config, seed=4)).is_complete


def test_model_that_no_memory_holds(make_config: MakeConfig) -> None:
    config = make_config(d_model=2**23)
    assert "out of memory while starting (RESOURCE_EXHAUSTED: Out of memory allocating " in refusal(config)
    assert {path.name for path in Path(config.train.run_dir).iterdir()} <= {LOCK, "checkpoints"}


def test_initial_weights_are_needed_at_the_first_start_only(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    config = make_config(init_from=str(folder), num_steps=4)
    assert f"train.init_from: no folder '{folder}'" in refusal(config)
    assert not Path(config.train.run_dir).exists()
    huggingface.save(folder, config.model, parameters.init(config.model, jax.random.key(0)), layout="hf")
    assert train(config).is_complete
    shutil.rmtree(folder)
    assert train(config).is_complete
    assert "no folder" in refusal(config, from_scratch=True)
    assert load_params(config.train.run_dir).step == 4


def test_absence_of_memory_is_not_every_error(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    monkeypatch.setattr(TrainProgram, "initialize", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        train(make_config())
