"""What happened to a run, apart from its numbers: `events.jsonl`, one JSON object a line, only ever appended to."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_jax.training.records import AppendOnlyFile, is_number, is_seconds, is_step, read_records, to_line


class EventLog:
    """Appends events to `events.jsonl` of a run directory."""

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        """Prepares the log.

        Args:
            run_dir: an existing folder.
            enabled: write anything at all; only the first process of several does.
        """
        self._file = AppendOnlyFile(run_dir / "events.jsonl") if enabled else None

    def write(self, event: str, **fields: object) -> None:
        """Appends `{"time": seconds since 1970, "event": event, **fields}`; a full disk is one warning.

        Args:
            event: such as "start" or "checkpoint".
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
    is_right: dict[str, Callable[[object], bool]] = _TYPES
    if record.get("event") == "goodput":
        is_right = {**_TYPES, "seconds": _is_time_by_bucket}
    return {name: value for name, value in record.items() if name not in is_right or is_right[name](value)}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_time_by_bucket(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_seconds, value.values()))


_TYPES: dict[str, Callable[[object], bool]] = {
    "time": is_seconds,
    "event": _is_text,
    "step": is_step,
    "first": is_step,
    "last": is_step,
    "devices": is_step,
    "processes": is_step,
    "device_kind": _is_text,
    "reason": _is_text,
    "folder": _is_text,
    "grad_norm": is_number,
    "seconds": is_seconds,
}
_ALWAYS = {"time", "event"}
_NEEDED = {"goodput": {*_ALWAYS, "step", "seconds"}}
