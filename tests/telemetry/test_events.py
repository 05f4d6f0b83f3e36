"""The event log survives kills and full disks."""

import contextlib
import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mamba_jax.telemetry import records
from mamba_jax.telemetry.events import EventLog, read_events
from mamba_jax.telemetry.records import AppendOnlyFile

FULL_DISK = Path("/dev/full")


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path, enabled=True)
    log.write("start", step=0, devices=8)
    log.write("goodput", step=5, seconds={"step": 1.5})
    first, second = read_events(tmp_path)
    assert (first["event"], first["step"], first["devices"]) == ("start", 0, 8)
    assert second["seconds"] == {"step": 1.5}
    assert 0 < first["time"] <= second["time"]


def test_earlier_events_are_never_rewritten(tmp_path: Path) -> None:
    EventLog(tmp_path, enabled=True).write("start", step=0)
    before = (tmp_path / "events.jsonl").read_bytes()
    EventLog(tmp_path, enabled=True).write("start", step=4)
    after = (tmp_path / "events.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 2


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_killed_while_writing(tmp_path: Path, cut: int) -> None:
    """A line that was cut off is lost alone: the next start is not glued to it."""
    log = EventLog(tmp_path, enabled=True)
    log.write("start", step=0)
    log.write("checkpoint", step=4)
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    EventLog(tmp_path, enabled=True).write("start", step=4)
    steps = [event["step"] for event in read_events(tmp_path) if event["event"] == "start"]
    assert steps == [0, 4]


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(
        b'7\n"text"\n{"event": "start"}\n\xff\xfe\n{"time": 1.0, "event": "start"}\n'
    )
    assert [event["time"] for event in read_events(tmp_path)] == [1.0]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    EventLog(tmp_path, enabled=False).write("start", step=0)
    assert list(tmp_path.iterdir()) == []
    assert read_events(tmp_path) == []


def test_what_json_lacks_is_written_as_text(tmp_path: Path) -> None:
    EventLog(tmp_path, enabled=True).write("profile", folder=Path("profile"))
    assert json.loads((tmp_path / "events.jsonl").read_text())["folder"] == "profile"


@pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no device that is always full")
def test_full_disk_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to(FULL_DISK)
    log = EventLog(tmp_path, enabled=True)
    with pytest.warns(UserWarning, match="cannot write .*events.jsonl.*the run goes on") as warned:
        [log.write("checkpoint", step=step) for step in range(3)]
    assert len(warned) == 1


def test_writing_resumes_when_there_is_room(tmp_path: Path) -> None:
    file = AppendOnlyFile(tmp_path / "new" / "metrics.jsonl")
    with pytest.warns(UserWarning, match="cannot write"):
        file.append("first\n")
    (tmp_path / "new").mkdir()
    file.append("second\n")
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == "first\nsecond\n"


@contextlib.contextmanager
def _room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes while the block runs: the write that does is cut in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", range(4, 15))
def test_a_record_is_whole_or_absent(tmp_path: Path, room: int) -> None:
    """However little of it fits, and also where several wait."""
    path = tmp_path / "metrics.jsonl"
    file = AppendOnlyFile(path)
    file.append("one\n")
    with _room_for(room), pytest.warns(UserWarning, match="File too large"):
        [file.append(text) for text in ("two\n", "three\n", "a sample\nof two lines\n")]
    assert path.read_text() == ("one\n", "one\ntwo\n", "one\ntwo\nthree\n")[(room >= 8) + (room >= 14)]
    file.close()
    assert path.read_text() == "one\ntwo\nthree\na sample\nof two lines\n"


def test_memory_for_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first records are kept, and those that came too late are counted."""
    monkeypatch.setattr(records, "MOST_PENDING", 20)
    path = tmp_path / "new" / "metrics.jsonl"
    file = AppendOnlyFile(path)
    with pytest.warns(UserWarning, match="cannot write") as warned:
        [file.append(f"step {step}\n") for step in range(10)]
    assert len(warned) == 1
    path.parent.mkdir()
    file.append("step 10\n")
    assert path.read_text() == "step 0\nstep 1\nstep 10\n"
    with pytest.warns(UserWarning, match="8 records of the metrics in .*new could not be written and are lost"):
        file.close()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_one_warning(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "events.jsonl")
    log = EventLog(tmp_path, enabled=True)
    with pytest.warns(UserWarning, match="cannot write"):
        log.write("start", step=0)
    with pytest.warns(UserWarning, match="1 records of the events"):
        log.close()
    assert read_events(tmp_path) == []


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON (RFC 8259)")


def test_values_that_are_not_finite_are_null_with_a_reason(tmp_path: Path) -> None:
    EventLog(tmp_path, enabled=True).write("skipped", step=1, grad_norm=math.nan, more={"x": [1.0, math.inf]})
    found = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=_refuse)
    assert (found["grad_norm"], found["more"]) == (None, {"x": [1.0, None]})
    assert found["not_finite"] == {"grad_norm": "nan", "more.x.1": "inf"}
    (event,) = read_events(tmp_path)
    assert math.isnan(event["grad_norm"])
    assert "not_finite" not in event


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('{"time": 5, "event": "start", "step": "x", "devices": 1e3}', {"time": 5, "event": "start"}),
        ('{"time": 5, "event": "start", "step": -1}', {"time": 5, "event": "start"}),
        ('{"time": 5, "event": "skipped", "grad_norm": null}', {"time": 5, "event": "skipped"}),
        ('{"time": 5, "event": "goodput", "step": 1}', None),
        ('{"time": 5, "event": "goodput", "step": 1, "seconds": 3.0}', None),
        ('{"time": 5, "event": "goodput", "step": 1, "seconds": {"step": "x"}}', None),
        ('{"time": 5, "event": "goodput", "step": true, "seconds": {"step": 1.0}}', None),
        ('{"time": 1e308, "event": "start"}', None),
        ('{"time": NaN, "event": "start"}', None),
        ('{"time": -1.0, "event": "start"}', None),
        ('{"time": 5, "event": ["start"]}', None),
        ('{"a":' * 100_000, None),
        ('{"time": 5, "event": "start", "a": ' + "[" * 20 + "]" * 20 + "}", None),
        ('{"time": 5, "event": "start", "step": 1' + "0" * 5000 + "}", None),
    ],
)
def test_fields_have_the_types_that_runs_write(tmp_path: Path, line: str, fields: dict | None) -> None:
    (tmp_path / "events.jsonl").write_text(line + "\n")
    assert read_events(tmp_path) == ([] if fields is None else [fields])
