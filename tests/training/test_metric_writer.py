"""The files and the terminal output of a run."""

import errno
import sys
import threading
import types
from pathlib import Path

import pytest
from rich.console import Console

from mamba_jax.training import metric_writer
from mamba_jax.training.loss_curve import plot_loss_curve
from mamba_jax.training.metric_writer import MetricWriter, StatusDisplay, format_seconds, read_metrics


def _write(run_dir: Path, steps: range, *, first_step: int, loss: float) -> None:
    writer = MetricWriter(run_dir, first_step=first_step)
    for step in steps:
        writer.write("train", step, {"cross_entropy": loss, "mfu": None})
        if step % 2 == 0:
            writer.write("validation", step, {"loss": loss + 1})
    writer.close()


def test_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 8), first_step=0, loss=1.0)
    # Killed in the middle of a line, with the last checkpoint at step 4.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    _write(tmp_path, range(5, 9), first_step=4, loss=2.0)
    records = read_metrics(tmp_path)
    train = {record["step"]: record["cross_entropy"] for record in records if record["kind"] == "train"}
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 9))
    assert [record["step"] for record in records if record["kind"] == "validation"] == [2, 6, 8]
    assert (train[4], train[5]) == (1.0, 2.0)
    assert all("mfu" not in record for record in records)


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class SummaryWriter:
        def __init__(self, folder: str, *, purge_step: int, max_queue: int) -> None:
            del max_queue
            calls.append((Path(folder).name, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = MetricWriter(tmp_path, first_step=3)
    writer.write("train", 4, {"loss": 1.5, "mfu": None})
    writer.close()
    assert calls == [("tensorboard", 4), ("train/loss", 1.5, 4), "closed"]


def test_tensorboard_whose_thread_died_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is never emptied again: one more scalar too many would block the run."""

    class SummaryWriter:
        def __init__(self, folder: str, *, purge_step: int, max_queue: int) -> None:
            del folder, purge_step, max_queue
            self.disk_is_full = threading.Event()
            self.thread = threading.Thread(target=self.disk_is_full.wait)
            self.thread.start()
            self.tags: list[str] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            del value, step
            self.tags.append(tag)
            self.disk_is_full.set()
            self.thread.join()

        def close(self) -> None:
            pytest.fail("waits for the queue")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = MetricWriter(tmp_path, first_step=0)
    with pytest.warns(UserWarning, match="TensorBoard files end"):
        writer.write("train", 1, {"loss": 1.5, "grad_norm": 1.0})
    writer.write("train", 2, {"loss": 1.5, "grad_norm": 1.0})
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_full_disk_costs_records_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    writer = MetricWriter(tmp_path, first_step=0)
    for name in ("metrics.jsonl", "samples.txt"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="cannot write") as warned:
        [writer.write("train", step, {"loss": 1.0}) for step in range(3)]
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="cannot write") as warned:
        [writer.write_sample(step, "text") for step in range(3)]
    assert len(warned) == 1


def test_resume_on_a_full_disk_keeps_the_old_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    _write(tmp_path, range(1, 8), first_step=0, loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_text()

    def no_room(path: Path, text: str) -> None:
        del path, text
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_room)
    with pytest.warns(UserWarning, match="cannot rewrite .*metrics.jsonl"):
        MetricWriter(tmp_path, first_step=4)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_works_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    _write(tmp_path, range(1, 3), first_step=0, loss=1.0)
    assert len(read_metrics(tmp_path)) == 3
    assert not (tmp_path / "tensorboard").exists()


def test_samples_are_appended(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, first_step=0)
    writer.write_sample(10, "the long\nsequence")
    writer.write_sample(20, "forget [the] rest")
    text = (tmp_path / "samples.txt").read_text()
    assert text.index("step 10") < text.index("the long\nsequence") < text.index("step 20") < text.index("[the]")


def test_resumed_run_has_every_sample_once(tmp_path: Path) -> None:
    first = MetricWriter(tmp_path, first_step=0)
    for step in (2, 4, 6):
        first.write_sample(step, f"--- old text {step}")
    second = MetricWriter(tmp_path, first_step=4)
    second.write_sample(6, "new text")
    text = (tmp_path / "samples.txt").read_text()
    assert "old text 2" in text
    assert "old text 4" not in text
    assert "old text 6" not in text
    assert "new text" in text


def test_loss_curve_shows_both_losses(tmp_path: Path) -> None:
    assert plot_loss_curve(tmp_path, title="empty") is None
    _write(tmp_path, range(1, 8), first_step=0, loss=1.0)
    path = plot_loss_curve(tmp_path, title="a run")
    assert path == tmp_path / "loss_curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = StatusDisplay(20, 0)
    with display.live():
        display.advance(1, None, None)
        display.advance(10, "loss 1.2500 | [1]", 75.0)
        display.note("a [bold]note[/bold]")
    assert capsys.readouterr().out.splitlines() == [
        "step 10/20 | loss 1.2500 | [1] | 1:15 left",
        "a [bold]note[/bold]",
    ]


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = StatusDisplay(20, 0, enabled=False)
    with display.live():
        display.advance(10, "loss", None)
        display.note("note")
    assert capsys.readouterr().out == ""


def test_bar_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns everything is on one line: step, total, loss, speed, MFU, time left."""
    monkeypatch.setattr(
        metric_writer,
        "Console",
        lambda **options: Console(**options, force_terminal=True, width=80, color_system=None, legacy_windows=False),
    )
    display = StatusDisplay(120_000, 0)
    with display.live():
        display.advance(60_000, "loss 1.2500 | 1,234,567 tokens/s | MFU 41.2%", 3600.0)
    lines = [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if "60000/120000" in line]
    assert lines
    assert max(map(len, lines)) <= 80 + len("\x1b[2K")
    for part in ("loss 1.2500", "1,234,567 tokens/s", "MFU 41.2%", "1:00:00"):
        assert part in lines[-1], lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (187.2, "3:07"), (3599.7, "1:00:00"), (8140.0, "2:15:40")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
