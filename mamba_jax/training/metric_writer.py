"""Where numbers and texts of a run go: `metrics.jsonl`, TensorBoard, `samples.txt`, and the terminal."""

import contextlib
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from mamba_jax.training.event_log import AppendOnlyFile, read_records
from mamba_jax.training.replacement import replacement

Kind = Literal["train", "validation", "validation_ema"]

_SAMPLE_HEADER = "--- step {}\n"
_SAMPLE = re.compile(r"^--- step (\d+)\n", re.MULTILINE)


class MetricWriter:
    """Appends records to the files of a run directory, dropping those that a resumed run will write again.

    A full disk costs records, after one warning per file, and never ends the run.
    """

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Opens the files.

        Args:
            run_dir: an existing folder.
            first_step: updates done so far; records of later steps stem from a run that was cut off, and are removed.
                So are evaluations and samples of this step itself, which may be missing and are made again.
        """
        self._metrics = AppendOnlyFile(run_dir / "metrics.jsonl")
        self._samples = AppendOnlyFile(run_dir / "samples.txt")
        _rewrite(run_dir / "metrics.jsonl", lambda: _metrics_until(run_dir, first_step))
        _rewrite(run_dir / "samples.txt", lambda: _samples_before(run_dir, first_step))
        self._tensorboard = _TensorBoard(run_dir / "tensorboard", first_step)

    def write(self, kind: Kind, step: int, values: Mapping[str, float | None]) -> None:
        """Writes one record; None values are left out.

        Args:
            kind: "train", "validation" or, of averaged weights, "validation_ema".
            step: updates done.
            values: by name.
        """
        known = {name: value for name, value in values.items() if value is not None}
        self._metrics.append(json.dumps({"kind": kind, "step": step, **known}) + "\n")
        self._tensorboard.write({f"{kind}/{name}": value for name, value in known.items()}, step)

    def write_sample(self, step: int, text: str) -> None:
        """Appends a text sample."""
        self._samples.append(_sample(step, text))

    def close(self) -> None:
        """Flushes what is buffered."""
        self._tensorboard.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`, oldest first; a last line that was cut off is passed over."""
    return [
        record
        for record in read_records(run_dir / "metrics.jsonl")
        if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    ]


def read_samples(run_dir: Path) -> list[tuple[int, str]]:
    """Samples of `samples.txt` with their steps, oldest first; a missing file holds none."""
    path = run_dir / "samples.txt"
    if not path.is_file():
        return []
    parts = _SAMPLE.split(path.read_text(errors="replace"))
    return [(int(step), text.removesuffix("\n\n")) for step, text in zip(parts[1::2], parts[2::2], strict=True)]


def _sample(step: int, text: str) -> str:
    return f"{_SAMPLE_HEADER.format(step)}{text}\n\n"


def _metrics_until(run_dir: Path, first_step: int) -> str:
    return "".join(
        json.dumps(record) + "\n"
        for record in read_metrics(run_dir)
        if record["step"] < first_step or (record["step"] == first_step and record["kind"] == "train")
    )


def _samples_before(run_dir: Path, first_step: int) -> str:
    return "".join(_sample(step, text) for step, text in read_samples(run_dir) if step < first_step)


def _rewrite(path: Path, make_text: Callable[[], str]) -> None:
    """Gives a file that exists another content; if that cannot be made or written, it keeps the one it has."""
    try:
        if path.is_file():
            with replacement(path) as temporary:
                temporary.write_text(make_text())
    except OSError as error:
        warnings.warn(f"cannot rewrite {path} ({error.strerror}); it keeps records of steps done again", stacklevel=3)


class _TensorBoard:
    """Scalars for TensorBoard, as long as tensorboardX is installed and able to write.

    A thread of tensorboardX does the writing. The first `OSError` ends that thread, and from then on a full queue
    would block the caller for ever: hence the long queue, and a look at the thread before each scalar.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = None
        before = set(threading.enumerate())
        try:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1, max_queue=1000)
        except ImportError:
            pass
        except OSError as error:
            warnings.warn(f"no TensorBoard files: cannot write {folder} ({error.strerror})", stacklevel=3)
        self._threads = set(threading.enumerate()) - before

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            if self._writer is None:
                return
            if not all(thread.is_alive() for thread in self._threads):
                self._writer = None
                warnings.warn(f"TensorBoard files end at step {step - 1}: their writer failed", stacklevel=3)
                return
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._writer is not None and all(thread.is_alive() for thread in self._threads):
            with contextlib.suppress(OSError):
                self._writer.close()


class StatusDisplay:
    """A progress bar on a terminal; elsewhere a line per report, which a full disk costs after one warning."""

    def __init__(self, total: int, completed: int, *, enabled: bool = True) -> None:
        """Prepares the display.

        Args:
            total: steps of the run.
            completed: steps done before.
            enabled: print anything at all; only the first process of several does.
        """
        self._console = Console(highlight=False, quiet=not enabled, soft_wrap=True)
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
        )
        self._task = self._progress.add_task("train", total=total, completed=completed, status="compiling")

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Shows the bar while the block runs."""
        with self._progress:
            yield

    def advance(self, step: int, status: str | None, seconds_left: float | None) -> None:
        """Moves the bar to `step`; `status`, if any, is shown beside it or printed as a line."""
        self._progress.update(self._task, completed=step)
        if status is None:
            return
        if seconds_left is not None:
            status += f" | {format_seconds(seconds_left)} left"
        self._progress.update(self._task, status=status)
        if not self._is_live:
            self.note(f"step {step}/{self._total} | {status}")

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        try:
            self._console.print(text, markup=False)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"cannot print what the run does ({error.strerror}); it goes on", stacklevel=2)


def format_seconds(seconds: float) -> str:
    """Such as 3:07 or 2:15:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
