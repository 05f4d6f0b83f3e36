"""A full disk: what a run needs ends it in one line, what it does not need is told once and costs nothing else."""

import dataclasses
import errno
import io
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import pytest
from matplotlib.figure import Figure

from mamba_jax.checkpoint import load_params
from mamba_jax.config import ExperimentConfig
from mamba_jax.errors import InputError
from mamba_jax.run import loop
from mamba_jax.run.directory import claim_run_directory
from mamba_jax.telemetry.loss_curve import plot_loss_curve
from mamba_jax.telemetry.metrics import MetricWriter, StatusDisplay

MakeConfig = Callable[..., ExperimentConfig]


def no_room(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullStream(io.StringIO):
    """A terminal's replacement that a shell redirected to a full disk."""

    def write(self, text: str) -> int:
        del text
        no_room()


def test_claiming_the_directory_is_one_line(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    run_dir = claim_run_directory(config)
    before = (run_dir / "config.json").read_text()
    renamed = dataclasses.replace(config, name="renamed")
    for method in ("mkdir", "write_text", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, no_room)
            with pytest.raises(InputError, match=r"cannot write train.run_dir .*No space left on device.*: make room"):
                claim_run_directory(renamed)
        assert {path.name for path in run_dir.iterdir()} == {"config.json"}
        assert (run_dir / "config.json").read_text() == before


def test_no_room_for_checkpoints_is_one_line(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Checkpointer", no_room)
    with pytest.raises(InputError, match=r"cannot keep checkpoints in .*No space left on device.*: make room"):
        loop.train(make_config(), devices=jax.devices()[:1])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_training_goes_on(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the checkpoint can be written: metrics, events, samples, TensorBoard, picture, profile, output."""

    def claim_and_fill(config: ExperimentConfig) -> Path:
        run_dir = claim_run_directory(config)
        for name in ("metrics.jsonl", "events.jsonl", "samples.txt"):
            (run_dir / name).symlink_to("/dev/full")
        (run_dir / "profile").write_text("no folder")
        return run_dir

    config = make_config(num_steps=6, sample_every=2, sample_tokens=4, profile_steps=(2, 3))
    monkeypatch.setattr(loop, "claim_run_directory", claim_and_fill)
    monkeypatch.setattr(Figure, "savefig", no_room)
    monkeypatch.setattr("mamba_jax.telemetry.loss_curve.read_metrics", lambda _: LOGGED)
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=no_room))
    monkeypatch.setattr("sys.stdout", FullStream())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = loop.train(config, devices=jax.devices()[:1])
    # A profile that cannot be written stays open in this process, where others follow.
    (Path(config.train.run_dir) / "profile").unlink()
    jax.profiler.stop_trace()
    assert result.is_complete
    assert load_params(config.train.run_dir).step == 6
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    for what in ("metrics.jsonl", "events.jsonl", "samples.txt", "TensorBoard", "loss curve", "cannot print"):
        assert sum(what in text for text in told) == 1, (what, told)


LOGGED = [{"kind": "train", "step": step, "cross_entropy": 5.0 - step} for step in (1, 2)]


def test_failed_profile_is_told(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = []
    monkeypatch.setattr(StatusDisplay, "note", lambda self, text: notes.append(text))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", no_room)
    assert loop.train(make_config(num_steps=4, profile_steps=(2, 3)), devices=jax.devices()[:1]).is_complete
    assert sum("no profile: " in note and "No space left on device" in note for note in notes) == 1


def test_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricWriter(tmp_path, first_step=0)
    writer.write("train", 1, {"cross_entropy": 5.0})
    writer.close()
    path = plot_loss_curve(tmp_path, title="run")
    assert path is not None
    before = path.read_bytes()

    def cut(self: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a picture")
        no_room()

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(OSError, match="No space left"):
        plot_loss_curve(tmp_path, title="run")
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".loss_curve*"))


def test_records_that_cannot_be_read_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails while a resumed run looks for what it will write again."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 7}\n')
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", no_room)
        with pytest.warns(UserWarning, match="cannot rewrite .*metrics.jsonl"):
            MetricWriter(tmp_path, first_step=4)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "train", "step": 7}\n'
