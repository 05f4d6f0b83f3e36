"""The event log of a run, `events.jsonl`: starts, saves, skipped steps and the like, one JSON object per line."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mamba_jax.telemetry.records import AppendOnlyFile, is_number, is_seconds, is_step, read_records, to_line

EventName = Literal[
    "start",
    "extended",
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
            enabled: False for all processes but the first, which write nothing.
        """
        self._file = AppendOnlyFile(run_dir / "events.jsonl") if enabled else None

    def write(self, event: EventName, **fields: object) -> None:
        """Appends `{"time": seconds since 1970, "event": event, **fields}`; a full disk only causes one warning.

        Args:
            event: name of the event.
            fields: values that JSON can hold; others are written as `str(value)`. NaN and infinity become null, and the
                field "not_finite" says which of them it was.
        """
        if self._file is not None:
            self._file.append(to_line({"time": time.time(), "event": event, **fields}))

    def close(self) -> None:
        """Tries once more to write events that a full disk kept out, and warns if they are lost."""
        if self._file is not None:
            self._file.close()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Reads the events of a run, oldest first; known fields have the types that runs write.

    Damaged lines and fields of another type are left out; a missing file gives no events. Every event has the fields
    "event" and "time"; the event "goodput" also has "step", and "seconds" as an object from bucket to seconds.

    Raises:
        OSError: the file cannot be read.
    """
    events = [_checked(record) for record in read_records(run_dir / "events.jsonl")]
    return [event for event in events if _NEEDED.get(event.get("event", ""), _ALWAYS) <= event.keys()]


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The record without known fields of a wrong type; numbers that may be whole are converted to float."""
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
    "parameters": _count,
    "trained_parameters": _count,
    "device_kind": _text,
    "reason": _text,
    "folder": _text,
    "changes": _text,
    "grad_norm": _number,
    "seconds": _seconds,
}
_ALWAYS = {"time", "event"}
_NEEDED = {"goodput": {*_ALWAYS, "step", "seconds"}}
