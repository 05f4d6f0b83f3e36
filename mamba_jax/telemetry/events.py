"""What happened to a run, apart from its numbers: `events.jsonl`, one JSON object a line, only ever appended to."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mamba_jax.telemetry.records import AppendOnlyFile, is_number, is_seconds, is_step, read_records, to_line

EventName = Literal[
    "start",
    "compiled",
    "checkpoint",
    "save_failed",
    "save_left_out",
    "not_removed",
    "quarantined",
    "skipped",
    "goodput",
    "profile",
    "aborted",
    "preempted",
    "finished",
]


class EventLog:
    """Appends events to `events.jsonl` of a run directory."""

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        """Prepares the log.

        Args:
            run_dir: an existing folder.
            enabled: write anything at all; only the first process of several does.
        """
        self._file = AppendOnlyFile(run_dir / "events.jsonl") if enabled else None

    def write(self, event: EventName, **fields: object) -> None:
        """Appends `{"time": seconds since 1970, "event": event, **fields}`; a full disk is one warning.

        Args:
            event: what happened.
            fields: what JSON can hold; anything else is written as its text. Of a number that is not finite the field
                "not_finite" says which it was.
        """
        if self._file is not None:
            self._file.append(to_line({"time": time.time(), "event": event, **fields}))

    def close(self) -> None:
        """Tries once more to write what a full disk kept out, and tells what is lost."""
        if self._file is not None:
            self._file.close()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Events of a run, oldest first, whose fields are of the types that runs write.

    Damaged lines are passed over, fields of another type are left out, and a missing file holds no events. Every event
    has "event" and "time"; "goodput" has "step" and "seconds" by bucket.

    Raises:
        OSError: the file cannot be read.
    """
    events = [_checked(record) for record in read_records(run_dir / "events.jsonl")]
    return [event for event in events if _NEEDED.get(event.get("event", ""), _ALWAYS) <= event.keys()]


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the known fields in their types, without those that are of another one."""
    types = _TYPES if record.get("event") != "goodput" else {**_TYPES, "seconds": _seconds_by_bucket}
    fields = {name: types[name](value) if name in types else value for name, value in record.items()}
    return {name: value for name, value in fields.items() if value is not None or name not in types}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if is_step(value) else None


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _seconds(value: Any) -> float | None:
    return float(value) if is_seconds(value) else None


def _seconds_by_bucket(value: Any) -> dict[str, float] | None:
    if not isinstance(value, dict) or not all(map(is_seconds, value.values())):
        return None
    return {bucket: float(seconds) for bucket, seconds in value.items()}


_TYPES: dict[str, Callable[[Any], Any]] = {
    "time": _seconds,
    "event": _text,
    "step": _count,
    "first": _count,
    "last": _count,
    "devices": _count,
    "processes": _count,
    "device_kind": _text,
    "reason": _text,
    "folder": _text,
    "grad_norm": _number,
    "seconds": _seconds,
}
_ALWAYS = {"time", "event"}
_NEEDED = {"goodput": {*_ALWAYS, "step", "seconds"}}
