"""The event log survives kills and full disks."""

import json
from pathlib import Path

import pytest

from mamba_jax.training.event_log import AppendOnlyFile, EventLog, read_events

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
        file.append("lost\n")
    (tmp_path / "new").mkdir()
    file.append("kept\n")
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == "kept\n"
