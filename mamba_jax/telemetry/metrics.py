"""Where numbers and texts of a run go: `metrics.jsonl`, TensorBoard, `samples.txt`, and the terminal."""

import contextlib
import io
import math
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from mamba_jax.cli import enduring
from mamba_jax.errors import clean_line
from mamba_jax.telemetry.records import MOST_WHOLE, AppendOnlyFile, is_step, parse_objects, read_records, to_line
from mamba_jax.telemetry.rewind import Fate, rewind

Kind = Literal["train", "validation", "validation_ema"]

# More digits than the number of any step has.
_SAMPLE_HEADER = re.compile(rb"^--- step (\d{1,15})\n", re.MULTILINE)
_SAMPLE_END = "\n\n"


class MetricWriter:
    """Appends records to the files of a run directory, dropping those that a resumed run will write again.

    What a full disk keeps out is told once per file and follows when there is room; it never ends the run.
    """

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Opens the files.

        Args:
            run_dir: an existing folder.
            first_step: updates done so far; records of later steps stem from a run that was cut off, and are removed.
                So are evaluations and samples of this step itself, which may be missing and are made again. All
                others stay byte for byte; lines that are damaged go to the folder `damaged`.
        """
        self._metrics = AppendOnlyFile(run_dir / "metrics.jsonl")
        self._samples = AppendOnlyFile(run_dir / "samples.txt")
        rewind(run_dir / "metrics.jsonl", lambda content: _lines(content, first_step))
        rewind(run_dir / "samples.txt", lambda content: _samples(content, first_step))
        self._tensorboard = _TensorBoard(run_dir / "tensorboard", first_step)

    def write(self, kind: Kind, step: int, values: Mapping[str, float | None]) -> None:
        """Writes one record; None values are left out, and numbers that are not finite are written as `to_line` says.

        Args:
            kind: "train", "validation" or, of averaged weights, "validation_ema".
            step: updates done.
            values: by name.
        """
        known = {name: value for name, value in values.items() if value is not None}
        self._metrics.append(to_line({"kind": kind, "step": step, **known}))
        self._tensorboard.write({f"{kind}/{name}": value for name, value in known.items()}, step)

    def write_sample(self, step: int, text: str) -> None:
        """Appends a text sample."""
        self._samples.append(_format_sample(step, text))

    def close(self) -> None:
        """Writes what is buffered or waits for room, and tells what is lost."""
        self._metrics.close()
        self._samples.close()
        self._tensorboard.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`, oldest first: "kind", "step", and numbers by name.

    A value that was written as null is the NaN or infinity that it was. Damaged lines, and fields that are not numbers,
    are passed over.

    Raises:
        OSError: the file cannot be read.
    """
    return [record for record in _metrics(read_records(run_dir / "metrics.jsonl")) if record is not None]


def read_samples(run_dir: Path) -> list[tuple[int, str]]:
    """Samples of `samples.txt` with their steps, oldest first; a missing file holds none.

    Raises:
        OSError: it cannot be read.
    """
    path = run_dir / "samples.txt"
    content = path.read_bytes() if path.is_file() else b""
    return [(step, _sample_text(part)) for step, part in _split_samples(content) if step is not None]


def _metrics(records: Iterable[dict[str, Any] | None]) -> Iterator[dict[str, Any] | None]:
    """Each record with its numbers alone; None for one that is none of a step."""
    for record in records:
        if record is None or not isinstance(record.get("kind"), str) or not is_step(record.get("step")):
            yield None
            continue
        # Not by `is_number`: a file can hold millions of them.
        yield {
            name: math.nan if value is None else value
            for name, value in record.items()
            if value is None
            or type(value) is float
            or (type(value) is int and abs(value) < MOST_WHOLE)
            or name == "kind"
        }


def _lines(content: bytes, first_step: int) -> Iterator[tuple[bytes, Fate]]:
    """Each line of `metrics.jsonl` and what becomes of it."""
    lines = [*io.BytesIO(content)]
    for line, record in zip(lines, _metrics(parse_objects(lines)), strict=True):
        if record is None:
            yield line, Fate.DAMAGED if line.endswith(b"\n") else Fate.CUT_OFF
        else:
            is_old = record["step"] < first_step or (record["step"] == first_step and record["kind"] == "train")
            yield line, Fate.KEPT if is_old else Fate.DONE_AGAIN


def _samples(content: bytes, first_step: int) -> Iterator[tuple[bytes, Fate]]:
    """Each sample of `samples.txt` and what becomes of it."""
    for step, part in _split_samples(content):
        if step is None:
            yield part, Fate.DAMAGED
        else:
            yield part, Fate.KEPT if step < first_step else Fate.DONE_AGAIN


def _format_sample(step: int, text: str) -> str:
    """A sample as it is in the file: the line "--- step STEP", the text, an empty line.

    A line of the text that begins like such a header, after any number of ">", gets one ">" more.

    Args:
        step: updates done.
        text: anything.
    """
    quoted = re.sub(r"^(>*--- step )", r">\1", text, flags=re.MULTILINE)
    return f"--- step {step}\n{quoted}{_SAMPLE_END}"


def _split_samples(content: bytes) -> Iterator[tuple[int | None, bytes]]:
    """The samples of a file with their steps, oldest first, each with its header and its end.

    Args:
        content: of the file.

    Yields:
        Pairs which together are the content; what comes before the first header belongs to no step.
    """
    starts = [*_SAMPLE_HEADER.finditer(content)]
    places = [*(match.start() for match in starts), len(content)]
    if places[0]:
        yield None, content[: places[0]]
    for match, end in zip(starts, places[1:], strict=True):
        yield int(match[1]), content[match.start() : end]


def _sample_text(sample: bytes) -> str:
    body = sample.partition(b"\n")[2]
    try:
        text = body.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = body.decode("utf-8", "replace")
    return re.sub(r"^>(>*--- step )", r"\1", text.removesuffix(_SAMPLE_END), flags=re.MULTILINE)


class _TensorBoard:
    """Scalars for TensorBoard, as long as tensorboardX is installed and able to write.

    A thread of tensorboardX does the writing. The first `OSError` ends that thread, and from then on a full queue
    would block the caller for ever: hence the long queue, and a look at the thread before each scalar. Whatever else
    goes wrong in that library ends its files and not the run.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = None
        before = set(threading.enumerate())
        try:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1, max_queue=1000)
        except ImportError:
            pass
        except Exception as error:
            warnings.warn(f"no TensorBoard files in {folder}: {_reason(error)}", stacklevel=3)
        self._threads = set(threading.enumerate()) - before

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            return
        try:
            for tag, value in scalars.items():
                if not all(thread.is_alive() for thread in self._threads):
                    raise RuntimeError("their writer failed")
                self._writer.add_scalar(tag, value, step)
        except Exception as error:
            self._writer = None
            warnings.warn(f"TensorBoard files end at step {step - 1}: {_reason(error)}", stacklevel=3)

    def close(self) -> None:
        if self._writer is not None and all(thread.is_alive() for thread in self._threads):
            try:
                self._writer.close()
            except Exception as error:
                warnings.warn(f"TensorBoard files may lack their end: {_reason(error)}", stacklevel=3)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or clean_line(str(error)) or type(error).__name__


class StatusDisplay:
    """A progress bar on a terminal; elsewhere a line per report.

    No output ends the run, wherever it goes: what cannot be printed is lost after one warning.
    """

    def __init__(self, total: int, completed: int, *, enabled: bool = True) -> None:
        """Prepares the display.

        Args:
            total: steps of the run.
            completed: steps done before.
            enabled: print anything at all; only the first process of several does.
        """
        self._stream = enduring(sys.stdout)
        self._console = Console(
            file=cast(Any, self._stream),
            highlight=False,
            quiet=not enabled,
            soft_wrap=True,
            **_size(),
        )
        self._total = total
        self._has_warned = False
        self._is_live = self._console.is_terminal and enabled
        self._progress = Progress(
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
            console=self._console,
            disable=not self._is_live,
            expand=True,
            # Warnings that were sent to a file do not belong above the bar.
            redirect_stderr=enduring(sys.stderr).isatty(),
        )
        self._task = self._progress.add_task("train", total=total, completed=completed, status="compiling")

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Shows the bar while the block runs."""
        self._show(self._progress.start)
        try:
            yield
        finally:
            self._show(self._progress.stop)

    def advance(self, step: int, status: str | None, seconds_left: float | None) -> None:
        """Moves the bar to `step`; `status`, if any, is shown beside it or printed as a line."""
        self._show(lambda: self._progress.update(self._task, completed=step))
        if status is None:
            return
        if seconds_left is not None:
            status += f" | {format_seconds(seconds_left)} left"
        self._show(lambda: self._progress.update(self._task, status=status))
        if not self._is_live:
            self.note(f"step {step}/{self._total} | {status}")

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._show(lambda: self._console.print(text, markup=False))

    def _show(self, show: Callable[[], None]) -> None:
        failure: Exception | None = None
        try:
            show()
        except Exception as error:
            failure = error
        failure = failure or self._stream.failure
        if failure is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"cannot print what the run does ({_reason(failure)}); it goes on", stacklevel=3)


def _size() -> dict[str, Any]:
    """Columns and lines where the environment claims to know them, within reason; empty to ask the terminal."""
    if "COLUMNS" not in os.environ and "LINES" not in os.environ:
        return {}
    columns, lines = shutil.get_terminal_size()
    return {"width": min(max(columns, 10), 1000), "height": min(max(lines, 2), 1000)}


def format_seconds(seconds: float) -> str:
    """Such as 3:07 or 2:15:40; "?" for what is not a time."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
