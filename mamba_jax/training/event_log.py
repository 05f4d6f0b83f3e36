"""What happened to a run, apart from its numbers: `events.jsonl`, one JSON object a line, only ever appended to."""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any


class AppendOnlyFile:
    """A text file that grows line by line and that a full disk cannot turn into the end of a run."""

    def __init__(self, path: Path) -> None:
        """Takes the path; nothing is opened before the first `append`."""
        self._path = path
        self._has_warned = False

    def append(self, text: str) -> None:
        """Writes whole lines at the end; an `OSError` is dropped after one warning per file.

        Args:
            text: ends in a newline. If the file ends in a line that was cut off, the text starts on a new one.
        """
        try:
            with self._path.open("ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    text = text if file.read(1) == b"\n" else f"\n{text}"
                file.write(text.encode())
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"cannot write {self._path} ({error.strerror}); the run goes on and its records are lost until "
                    "writing works again",
                    stacklevel=2,
                )


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
        """Appends `{"time": seconds since 1970, "event": event, **fields}`; an `OSError` is dropped after one warning.

        Args:
            event: such as "start" or "checkpoint".
            fields: what JSON can hold; anything else is written as its text.
        """
        if self._file is not None:
            self._file.append(json.dumps({"time": time.time(), "event": event, **fields}, default=str) + "\n")


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Events of a run, oldest first; lines that were cut off are passed over, and a missing file holds none."""
    return [
        record
        for record in read_records(run_dir / "events.jsonl")
        if isinstance(record.get("event"), str) and isinstance(record.get("time"), int | float)
    ]


def read_records(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a file that holds one a line; other lines are passed over, and a missing file holds none."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
