"""Reads JSON lines: one object a line, each a document."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_jax.data.sources.formats import FileOnDisk, open_stream
from mamba_jax.data.sources.records import BadRecord, OnBad, RecordText
from mamba_jax.data.sources.supervised import Dialogue, SupervisedRecord

# A line has to be in memory whole. A judgement: ten thousand pages.
MAX_LINE = 64 * 2**20


def line_lengths(file: io.BufferedReader) -> Iterator[int]:
    """Length in bytes of each line from the present position on, with its line break; a long line comes in parts."""
    while line := file.readline(MAX_LINE):
        yield len(line)


def line_texts(
    file: FileOnDisk, span: tuple[int, int | None], *, text_of: RecordText | SupervisedRecord, on_bad: OnBad
) -> Iterator[tuple[str | Dialogue, int]]:
    """The documents of the lines that begin within a span of the file; empty lines are passed over.

    Args:
        file: the file.
        span: positions in unpacked bytes; None is the end of the file.
        text_of: makes the document of an object.
        on_bad: is called for each line that has none.

    Yields:
        A document, and how many bytes of the file on disk have been read for this span so far.
    """
    start, end = span
    with open_stream(file) as stream:
        number = position = 0
        if file.compression is None and start:
            stream.file.seek(start)
            position = start
        while (end is None or position < end) and (line := stream.file.readline(MAX_LINE + 1)):
            number, begin = number + 1, position
            position += len(line)
            if begin < start:
                continue
            problem = text = None
            if len(line) > MAX_LINE:
                problem = f"has more than {MAX_LINE:,} bytes"
                position += _finish_line(stream.file, line)
            elif not line.isspace():
                try:
                    text = text_of(_parse(line))
                except BadRecord as error:
                    problem = str(error)
            if problem is not None:
                before = _lines_before(file.path, start) if file.compression is None else 0
                on_bad(f"{file.path} line {before + number} {problem}")
            if text:
                yield text, position - start if file.compression is None else stream.packed.tell()


def _parse(line: bytes) -> dict[str, Any]:
    """The object of a line; a byte order mark in front of it is allowed."""
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"is not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        whole = line.lstrip()[:1] == b"[" or line.strip() == b"{"
        advice = " (a file has to hold one whole object a line)" if whole else ""
        raise BadRecord(f"is not JSON: {error.msg.removesuffix(' at')} at character {error.colno}{advice}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"is not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"is no JSON object but {type(record).__name__}: write one object a line")
    return record


def _finish_line(file: io.BufferedReader, line: bytes) -> int:
    """Reads on to the end of a line that is too long to be kept; returns the bytes that were read."""
    count = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)
        count += len(line)
    return count


def _lines_before(path: Path, position: int) -> int:
    """How many lines end before a position of a plain file; counted only when a message needs it."""
    count = 0
    with path.open("rb") as file:
        while position > 0 and (block := file.read(min(position, 2**20))):
            count += block.count(b"\n")
            position -= len(block)
    return count
