"""The files and the terminal output of a run."""

import errno
import io
import json
import math
import struct
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mamba_jax.telemetry import metrics as metric_writer
from mamba_jax.telemetry.loss_curve import plot_loss_curve
from mamba_jax.telemetry.metrics import MetricWriter, StatusDisplay, format_seconds, read_metrics, read_samples


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
    calls: list[Any] = []

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


def test_files_of_tensorboard_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own format: each record is its length in 8 bytes, 4 of checksum, the event, 4 of checksum."""
    monkeypatch.delitem(sys.modules, "tensorboardX")
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    writer = MetricWriter(tmp_path, first_step=3)
    for step in (4, 5):
        writer.write("train", step, {"loss": 0.5 * step})
    writer.close()
    assert not [thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboardX")]
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, scalars = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        scalars += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
        content = content[16 + length :]
    assert scalars == [("train/loss", 2.0, 4), ("train/loss", 2.5, 5)]


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
def test_full_disk_costs_records_only(tmp_path: Path) -> None:
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
    _write(tmp_path, range(1, 8), first_step=0, loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_text()

    def no_room(path: Path, content: bytes) -> None:
        del path, content
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.warns(UserWarning, match="cannot rewrite .*metrics.jsonl"):
        MetricWriter(tmp_path, first_step=4)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_works_without_tensorboard(tmp_path: Path) -> None:
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


SAMPLES = (
    "a\r\nb\rc",
    "x\n--- step 999\ny",
    "--- step 3\n",
    ">--- step 3\n>>--- step 4",
    "",
    "\n\n\n",
    "\ud800\x00\x85é",
)


def test_every_sample_comes_back(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, first_step=0)
    for step, text in enumerate(SAMPLES):
        writer.write_sample(step, text)
    assert read_samples(tmp_path) == list(enumerate(SAMPLES))
    before = (tmp_path / "samples.txt").read_bytes()
    MetricWriter(tmp_path, first_step=3)
    assert read_samples(tmp_path) == list(enumerate(SAMPLES[:3]))
    assert before.startswith((tmp_path / "samples.txt").read_bytes())


def test_old_samples_are_read(tmp_path: Path) -> None:
    (tmp_path / "samples.txt").write_bytes(b"--- step 10\nthe \xff end\n\n\n--- step 20\nno end")
    assert read_samples(tmp_path) == [(10, "the \ufffd end\n"), (20, "no end")]


def test_what_a_resume_keeps_it_keeps_byte_for_byte(tmp_path: Path) -> None:
    """Lines of older versions, spaces and fields that nobody knows included."""
    lines = (
        b'{"kind": "train", "step": 1, "loss": NaN}\n',
        b'{"step":2,"kind":"train","x":"\xc3\xa9","y":{"z":[1]}}\r\n',
        b'{"kind": "train", "step": 3, "loss": 1.10000}\n',
        b'{"kind": "validation", "step": 3, "loss": 1.0}\n',
        b'{"kind": "train", "step": 4, "loss": 1.0}\n',
    )
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    MetricWriter(tmp_path, first_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:3])
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "train", "step": 3, "loss: 1.0}\n',
        b'{"kind": "train", "stap": 3, "loss": 1.0}\n',
        b'{"kind": "train", "step": 3, "loss": "\xff"}\n',
        b'{"kind": "train", "step": 3.5}\n',
        b"\0" * 4096 + b"\n",
        b'{"a":' * 100_000 + b"\n",
        b'{"kind": "train", "step": 3, "loss": 1' + b"0" * 5000 + b"}\n",
        # One flipped bit makes a 3 a 7: whole, and yet in the wrong place.
        b'{"kind": "train", "step": 7, "loss": 1.0}\n',
    ],
)
def test_damaged_lines_are_kept_aside(tmp_path: Path, line: bytes) -> None:
    good = [b'{"kind": "train", "step": %d, "loss": 1.0}\n' % step for step in range(6)]
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "damaged" / "metrics.jsonl"
    path.write_bytes(b"".join([*good[:3], line, *good[4:]]))
    with pytest.warns(UserWarning, match="metrics.jsonl was damaged; parts moved to .*damaged/metrics.jsonl: 1"):
        MetricWriter(tmp_path, first_step=4)
    assert path.read_bytes() == b"".join([*good[:3], good[4]])
    assert aside.read_bytes() == line
    MetricWriter(tmp_path, first_step=4)
    assert aside.read_bytes() == line


def test_no_room_to_keep_damaged_lines_leaves_them_where_they_are(tmp_path: Path) -> None:
    content = b'{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "damaged").write_text("no folder")
    with pytest.warns(UserWarning, match="cannot rewrite .*metrics.jsonl"):
        MetricWriter(tmp_path, first_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_a_file_that_is_a_link_stays_one(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.jsonl"
    target.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')
    (tmp_path / "metrics.jsonl").symlink_to(target)
    MetricWriter(tmp_path, first_step=1)
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert target.read_text() == '{"kind": "train", "step": 1}\n'


def test_values_that_are_not_finite_come_back(tmp_path: Path) -> None:
    values = {"loss": math.nan, "grad_norm": -math.inf, "skipped": 1.0}
    MetricWriter(tmp_path, first_step=0).write("train", 1, values)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (None, None, 1.0)
    assert line["not_finite"] == {"loss": "nan", "grad_norm": "-inf"}
    (record,) = read_metrics(tmp_path)
    assert record == pytest.approx({"kind": "train", "step": 1, **values}, nan_ok=True)


def test_tensorboard_that_fails_ends_its_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SummaryWriter:
        def __init__(self, folder: str, *, purge_step: int, max_queue: int) -> None:
            del folder, purge_step, max_queue

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            raise TypeError(f"no {tag} of {value} at {step}")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = MetricWriter(tmp_path, first_step=0)
    with pytest.warns(UserWarning, match="TensorBoard files end at step 4: no train/loss of 1.0 at 5"):
        writer.write("train", 5, {"loss": 1.0})
    writer.close()
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=None))
    with pytest.warns(UserWarning, match="no TensorBoard files"):
        MetricWriter(tmp_path, first_step=0)


def test_loss_curve_of_numbers_and_names_that_plots_dislike(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, first_step=0)
    for step, loss in enumerate((math.nan, 1.7e308, -1.7e308, math.inf, 2.0)):
        writer.write("train", step, {"cross_entropy": loss})
    assert plot_loss_curve(tmp_path, title="$\\frac{ a\nb") == tmp_path / "loss_curve.png"


def test_loss_curve_shows_both_losses(tmp_path: Path) -> None:
    assert plot_loss_curve(tmp_path, title="empty") is None
    _write(tmp_path, range(1, 8), first_step=0, loss=1.0)
    path = plot_loss_curve(tmp_path, title="a run")
    assert path is not None
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


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError], ids=lambda error: error.__name__)
def test_output_that_fails_is_one_warning(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Left alone, rich ends the process for a broken pipe."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error(errno.EPIPE, f"cannot take {len(text)}") if error is not ValueError else error("closed")

    monkeypatch.setattr("sys.stdout", Gone())
    display = StatusDisplay(20, 0)
    with pytest.warns(UserWarning, match="cannot print what the run does .*; it goes on") as warned:
        [display.note("note") for _ in range(3)]
    assert len(warned) == 1


def test_warnings_beside_a_bar_go_where_they_were_sent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal for the bar and a file for standard error, as of `2> log`."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with StatusDisplay(20, 0).live():
        print("a warning", file=sys.stderr)
    assert capsys.readouterr().err == "a warning\n"


def test_characters_that_the_output_lacks_are_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    StatusDisplay(20, 0).note("a\ufffdb é \udcff")
    assert raw.getvalue() == rb"a\ufffdb \xe9 \udcff" + b"\n"


@pytest.mark.parametrize("columns", ["0", "1", "²", "9" * 12, "9" * 5000, "-5", "wide"])
def test_odd_sizes_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = StatusDisplay(20, 0)
    with display.live():
        display.advance(10, "loss", None)
        display.note("a note")
    assert "a note" in capsys.readouterr().out


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = StatusDisplay(20, 0, enabled=False)
    with display.live():
        display.advance(10, "loss", None)
        display.note("note")
    assert capsys.readouterr().out == ""


def test_bar_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns everything is on one line: step, total, loss, speed, MFU, time left."""
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
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
