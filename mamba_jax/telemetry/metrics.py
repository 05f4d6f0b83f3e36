"""Writes and reads the numbers and text samples of a run: `metrics.jsonl`, `samples.txt`, TensorBoard, the terminal."""

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

# Of the weights or their moving average; records of a part of a mixture have its name behind a slash.
Kind = Literal["validation", "validation_ema"]

# A step has at most 10 digits (`TrainConfig.num_steps` is below 2**31); a line with more than 15 is not a header.
_SAMPLE_HEADER = re.compile(rb"^--- step (\d{1,15})\n", re.MULTILINE)
_SAMPLE_END = "\n\n"


class MetricWriter:
    """Appends metrics and samples to the files of a run directory, and removes those that a resumed run repeats.

    A full disk never ends the run: there is one warning per file, and the records are written when there is room.
    """

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Opens the files.

        Args:
            run_dir: an existing folder.
            first_step: updates done so far. Records of later steps, which an earlier start wrote before it was cut off,
                are removed, and so are evaluations and samples of this step, because they are made again. All others
                stay byte for byte; damaged lines are moved to the folder `damaged`.
        """
        self._metrics = AppendOnlyFile(run_dir / "metrics.jsonl")
        self._samples = AppendOnlyFile(run_dir / "samples.txt")
        rewind(run_dir / "metrics.jsonl", lambda content: _lines(content, first_step))
        rewind(run_dir / "samples.txt", lambda content: _samples(content, first_step))
        self._tensorboard = _TensorBoard(run_dir / "tensorboard", first_step)

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Writes one record to `metrics.jsonl` and TensorBoard.

        Args:
            kind: "train"; "validation"; or "validation_ema", the validation loss of the averaged weights; of part
                NAME of a mixture "validation/NAME" and "validation_ema/NAME".
            step: updates done.
            values: numbers by name. Those that are None are left out; for NaN and infinity see `to_line`.
        """
        known = {name: value for name, value in values.items() if value is not None}
        self._metrics.append(to_line({"kind": kind, "step": step, **known}))
        self._tensorboard.write({f"{kind}/{name}": value for name, value in known.items()}, step)

    def write_sample(self, step: int, text: str) -> None:
        """Appends a text sample."""
        self._samples.append(_format_sample(step, text))

    def close(self) -> None:
        """Writes everything that is buffered or waits for room on the disk, and warns of records that are lost."""
        self._metrics.close()
        self._samples.close()
        self._tensorboard.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Reads the records of `metrics.jsonl`, oldest first: "kind", "step", and numbers by name.

    NaN and infinity, which the file holds as null, are restored. Damaged lines and fields that are not numbers are left
    out.

    Raises:
        OSError: the file cannot be read.
    """
    return [record for record in _metrics(read_records(run_dir / "metrics.jsonl")) if record is not None]


def read_samples(run_dir: Path) -> list[tuple[int, str]]:
    """Reads (step, text) of each sample in `samples.txt`, oldest first; a missing file gives none.

    Raises:
        OSError: the file cannot be read.
    """
    path = run_dir / "samples.txt"
    content = path.read_bytes() if path.is_file() else b""
    return [(step, _sample_text(part)) for step, part in _split_samples(content) if step is not None]


def _metrics(records: Iterable[dict[str, Any] | None]) -> Iterator[dict[str, Any] | None]:
    """For each record, its "kind" and its numbers only; None if it is damaged or has no kind or step."""
    for record in records:
        if record is None or not isinstance(record.get("kind"), str) or not is_step(record.get("step")):
            yield None
            continue
        # Written out instead of calling `is_number`, because a file can hold millions of numbers.
        yield {
            name: math.nan if value is None else value
            for name, value in record.items()
            if value is None
            or type(value) is float
            or (type(value) is int and abs(value) < MOST_WHOLE)
            or name == "kind"
        }


def _lines(content: bytes, first_step: int) -> Iterator[tuple[bytes, Fate]]:
    """Splits `metrics.jsonl` into lines and says what a run that resumes at `first_step` does with each."""
    lines = [*io.BytesIO(content)]
    for line, record in zip(lines, _metrics(parse_objects(lines)), strict=True):
        if record is None:
            yield line, Fate.DAMAGED if line.endswith(b"\n") else Fate.CUT_OFF
        else:
            is_old = record["step"] < first_step or (record["step"] == first_step and record["kind"] == "train")
            yield line, Fate.KEPT if is_old else Fate.DONE_AGAIN


def _samples(content: bytes, first_step: int) -> Iterator[tuple[bytes, Fate]]:
    """Splits `samples.txt` into samples and says what a run that resumes at `first_step` does with each."""
    for step, part in _split_samples(content):
        if step is None:
            yield part, Fate.DAMAGED
        else:
            yield part, Fate.KEPT if step < first_step else Fate.DONE_AGAIN


def _format_sample(step: int, text: str) -> str:
    """A sample in the format of the file: the line "--- step STEP", the text, an empty line.

    Lines of the text that look like such a header are quoted with ">", and lines that look quoted get one ">" more, so
    that `_sample_text` can restore any text.
    """
    quoted = re.sub(r"^(>*--- step )", r">\1", text, flags=re.MULTILINE)
    return f"--- step {step}\n{quoted}{_SAMPLE_END}"


def _split_samples(content: bytes) -> Iterator[tuple[int | None, bytes]]:
    """Splits the content of `samples.txt` at the headers.

    Yields:
        (step, bytes of the sample with its header) in the order of the file. Bytes before the first header come first,
        with None for the step.
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
    """Writes scalars for TensorBoard, if tensorboardX is installed; any failure of it ends these files, not the run.

    A thread of tensorboardX does the writing. The first `OSError` ends that thread, and then a full queue would block
    the caller forever. So the thread is checked before each scalar, and the queue is long enough (1000) that it cannot
    fill up between the check and the call.
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
        """Passes the values of one step to TensorBoard; the first failure warns, and ends the files."""
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
    """Shows progress: a bar on a terminal, elsewhere a line per report.

    Failing output (a closed pipe, a full disk) never ends the run: there is one warning, and the text is lost.
    """

    def __init__(self, total: int, completed: int, *, enabled: bool = True) -> None:
        """Prepares the display.

        Args:
            total: steps of the run.
            completed: steps that were done before this start.
            enabled: False for all processes but the first, which print nothing.
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
            # If standard error goes to a file, warnings stay there and are not printed above the bar.
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
        """Calls `show`, which prints to the terminal; of all failures the first causes a warning, and none an error."""
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
    """Size of the terminal from COLUMNS and LINES, limited to sensible values; empty if they are not set."""
    if "COLUMNS" not in os.environ and "LINES" not in os.environ:
        return {}
    columns, lines = shutil.get_terminal_size()
    return {"width": min(max(columns, 10), 1000), "height": min(max(lines, 2), 1000)}


def format_seconds(seconds: float) -> str:
    """A duration as text, such as 3:07 or 2:15:40; "?" if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
