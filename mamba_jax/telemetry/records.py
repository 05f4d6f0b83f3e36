"""Files of records, one JSON object a line: written strictly and whole, read without trust."""

import contextlib
import json
import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

# Bytes of records that a file keeps in memory for want of room on the disk: weeks of a run that reports now and then.
MOST_PENDING = 16 * 2**20
# More than any run has steps; a larger number is the work of a flipped bit.
MOST_STEPS = 2**40
# Beyond it, a whole number is no field of ours, and in the end none that a float can hold.
MOST_WHOLE = 2**63
# The last second of the year 9999, where calendars of computers end.
LAST_SECOND = 253_402_300_799

_NOT_FINITE = "not_finite"
_DEEPEST = 16


class AppendOnlyFile:
    """A file that grows by whole records and that a full disk cannot turn into the end of a run.

    Records that cannot be written are kept in memory and follow, in their order, when there is room.
    """

    def __init__(self, path: Path) -> None:
        """Takes the path; nothing is opened before the first `append`."""
        self._path = path
        # Saves tell of their end from a thread of their own.
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._lost = 0
        self._has_warned = False

    def append(self, text: str) -> None:
        """Writes what is pending and then the text, each whole or not at all; an `OSError` is one warning per file.

        Args:
            text: one record, which ends in a newline. If the file ends in a line that was cut off, the text starts on
                a new one. Once `MOST_PENDING` bytes are pending, a record that cannot be written is lost.
        """
        with self._lock:
            self._pending.append(text.encode("utf-8", "surrogatepass"))
            self._write()
            if sum(map(len, self._pending)) > MOST_PENDING:
                self._pending.pop()
                self._lost += 1

    def close(self) -> None:
        """Tries once more to write what is pending, and tells how many records were lost."""
        if self._pending:
            self._write()
        lost, self._lost = self._lost + len(self._pending), 0
        self._pending.clear()
        if lost:
            warnings.warn(
                f"{lost} records of the {self._path.stem} in {self._path.parent} could not be written and are lost",
                stacklevel=2,
            )

    def _write(self) -> None:
        count = 0
        try:
            with self._path.open("ab+", buffering=0) as file:
                for record in self._pending:
                    _append_whole(file, record)
                    count += 1
        except OSError as error:
            if count == len(self._pending):
                # Closing it failed, where network file systems tell that an earlier write did.
                count = 0
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"cannot write {self._path} ({error.strerror or error}); the run goes on, and its records, up to "
                    f"{MOST_PENDING // 2**20} MiB of them, wait in memory until writing works again",
                    stacklevel=3,
                )
        for _ in range(count):
            self._pending.popleft()


def append_whole(path: Path, records: Iterable[bytes]) -> None:
    """Appends records to a file and waits until the disk has them.

    Raises:
        OSError: not all could be written; none is half there.
    """
    with path.open("ab+", buffering=0) as file:
        for record in records:
            _append_whole(file, record if record.endswith(b"\n") else record + b"\n")
        os.fsync(file.fileno())


def _append_whole(file: FileIO, record: bytes) -> None:
    size = file.seek(0, os.SEEK_END)
    if size > 0:
        file.seek(-1, os.SEEK_END)
        record = record if file.read(1) == b"\n" else b"\n" + record
    left = memoryview(record)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        if len(left) < len(record):
            with contextlib.suppress(OSError):
                file.truncate(size)
        raise


def to_line(record: Mapping[str, object]) -> str:
    """The record as a line of strict JSON (RFC 8259).

    A number that is not finite becomes null, and the field "not_finite" says which one it was: for the record
    `{"loss": nan}` it is `{"loss": "nan"}`. Numbers inside other objects go by their dotted name.

    Args:
        record: what JSON can hold; anything else is written as its text.
    """
    reasons: dict[str, str] = {}
    plain = {name: _finite(value, name, reasons) for name, value in record.items()}
    if reasons:
        plain[_NOT_FINITE] = reasons
    return json.dumps(plain, default=str, allow_nan=False) + "\n"


def _finite(value: object, name: str, reasons: dict[str, str]) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        reasons[name] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part, f"{name}.{key}", reasons) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{name}.{place}", reasons) for place, part in enumerate(value)]
    return value


def parse_objects(texts: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """The JSON object of each text; None for a text that is damaged, or nested deeper than any of ours."""
    for text in texts:
        try:
            found = json.loads(text.decode())
        except (ValueError, RecursionError):
            yield None
            continue
        if isinstance(found, dict):
            inner = [value for value in found.values() if isinstance(value, dict | list)]
            yield found if all(_is_shallow(value, _DEEPEST) for value in inner) else None
        else:
            yield None


def _is_shallow(value: dict[str, Any] | list[Any], levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in inner if isinstance(part, dict | list))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a file, with NaN and infinities as they were before `to_line`.

    Damaged lines are passed over, and a missing file holds no records.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        records = [record for record in parse_objects(file) if record is not None]
    for record in records:
        if _NOT_FINITE in record:
            _restore(record)
    return records


def _restore(record: dict[str, Any]) -> None:
    reasons = record.pop(_NOT_FINITE)
    for name, reason in reasons.items() if isinstance(reasons, dict) else ():
        if reason in ("nan", "inf", "-inf") and name in record and record[name] is None:
            record[name] = float(reason)


def is_step(value: Any) -> bool:
    """Whether this is a number of updates."""
    return type(value) is int and 0 <= value <= MOST_STEPS


def is_number(value: Any) -> bool:
    """Whether this is a number, NaN and infinities included, that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < MOST_WHOLE)


def is_seconds(value: Any) -> bool:
    """Whether this can be the time of a run, or a time within it."""
    return is_number(value) and 0 <= value <= LAST_SECOND
