"""Files of JSON objects, one per line: records are written whole or not at all, and read with damage in mind."""

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

# Bytes of records that are kept in memory while the disk is full. A record takes some 300 bytes: 50,000 records.
MOST_PENDING = 16 * 2**20
# Above the number of steps of any run (`TrainConfig.num_steps` is below 2**31); a larger one is a damaged record.
MOST_STEPS = 2**40
# Whole numbers from here on are not written by any run; very large ones could not be converted to float.
MOST_WHOLE = 2**63
# The last second of the year 9999, where calendars of computers end.
LAST_SECOND = 253_402_300_799

_NOT_FINITE = "not_finite"
_DEEPEST = 16


class AppendOnlyFile:
    """A file to which whole records are appended; errors of the disk never reach the caller.

    Records that cannot be written are kept in memory and written later, in their order, when there is room.
    """

    def __init__(self, path: Path) -> None:
        """Stores the path; nothing is opened before the first `append`."""
        self._path = path
        # The background thread that saves checkpoints appends events, too.
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._lost = 0
        self._has_warned = False

    def append(self, text: str) -> None:
        """Writes pending records and then this one, each whole or not at all; the first `OSError` causes a warning.

        If the file ends in a line that was cut off, the record starts on a new line. When `MOST_PENDING` bytes are
        pending already, a record that cannot be written is lost.

        Args:
            text: one record, which ends in a newline.
        """
        with self._lock:
            self._pending.append(text.encode("utf-8", "surrogatepass"))
            self._write()
            if sum(map(len, self._pending)) > MOST_PENDING:
                self._pending.pop()
                self._lost += 1

    def close(self) -> None:
        """Tries once more to write pending records, and warns with the number of records that are lost."""
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
        """Writes pending records in order; those from the first failure on stay pending."""
        count = 0
        try:
            with self._path.open("ab+", buffering=0) as file:
                for record in self._pending:
                    _append_whole(file, record)
                    count += 1
        except OSError as error:
            if count == len(self._pending):
                # All writes returned but closing failed: network file systems report failed writes only then.
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
        OSError: not all records could be written; the file ends after a whole one.
    """
    with path.open("ab+", buffering=0) as file:
        for record in records:
            _append_whole(file, record if record.endswith(b"\n") else record + b"\n")
        os.fsync(file.fileno())


def _append_whole(file: FileIO, record: bytes) -> None:
    """Appends a record, on a new line; if writing fails, cuts off what was written of it, and raises the error."""
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
    """The record as a line of strict JSON (RFC 8259), which has no NaN and no infinity.

    Such a number becomes null, and the extra field "not_finite" says what it was: `{"loss": nan}` is written as
    `{"loss": null, "not_finite": {"loss": "nan"}}`. Numbers inside nested objects are named with dots.

    Args:
        record: values that JSON can hold; others are written as `str(value)`.
    """
    reasons: dict[str, str] = {}
    plain = {name: _finite(value, name, reasons) for name, value in record.items()}
    if reasons:
        plain[_NOT_FINITE] = reasons
    return json.dumps(plain, default=str, allow_nan=False) + "\n"


def _finite(value: object, name: str, reasons: dict[str, str]) -> object:
    """A value for JSON with None for every float that is not finite; `reasons` gets its text, by dotted name."""
    if isinstance(value, float) and not math.isfinite(value):
        reasons[name] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part, f"{name}.{key}", reasons) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{name}.{place}", reasons) for place, part in enumerate(value)]
    return value


def parse_objects(texts: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """Parses each text as a JSON object; None for a text that is damaged or nested deeper than any of our records."""
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
    """Reads the records of a file, and restores NaN and infinities that `to_line` has replaced.

    Damaged lines are left out; a missing file gives no records.

    Raises:
        OSError: the file cannot be read.
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
    """Whether the value can be a step: a whole number from 0 to `MOST_STEPS`."""
    return type(value) is int and 0 <= value <= MOST_STEPS


def is_number(value: Any) -> bool:
    """Whether the value is a float (NaN and infinity included), or a whole number that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < MOST_WHOLE)


def is_seconds(value: Any) -> bool:
    """Whether the value can be a time in seconds, since 1970 or since the start of a run."""
    return is_number(value) and 0 <= value <= LAST_SECOND
