"""Where numbers and texts of a run go: `metrics.jsonl`, TensorBoard, `samples.txt`, and the terminal."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

Kind = Literal["train", "validation"]

_SAMPLE_HEADER = "--- step {}\n"
_SAMPLE = re.compile(r"^--- step (\d+)\n", re.MULTILINE)


class MetricWriter:
    """Appends records to the files of a run directory, dropping those that a resumed run will write again."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Opens the files.

        Args:
            run_dir: an existing folder.
            first_step: updates done so far; records of later steps stem from a run that was cut off, and are removed.
                So are evaluations and samples of this step itself, which may be missing and are made again.
        """
        self._path = run_dir / "metrics.jsonl"
        self._samples = run_dir / "samples.txt"
        kept = [
            record
            for record in read_metrics(run_dir)
            if record["step"] < first_step or (record["step"] == first_step and record["kind"] == "train")
        ]
        _replace(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        if self._samples.is_file():
            samples = _SAMPLE.split(self._samples.read_text())
            headed = zip(samples[1::2], samples[2::2], strict=True)
            kept_samples = (_SAMPLE_HEADER.format(step) + text for step, text in headed if int(step) < first_step)
            _replace(self._samples, "".join(kept_samples))
        self._tensorboard = _open_tensorboard(run_dir, first_step)

    def write(self, kind: Kind, step: int, values: Mapping[str, float | None]) -> None:
        """Writes one record; None values are left out.

        Args:
            kind: "train" or "validation".
            step: updates done.
            values: by name.
        """
        known = {name: value for name, value in values.items() if value is not None}
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **known}) + "\n")
        if self._tensorboard is not None:
            for name, value in known.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def write_sample(self, step: int, text: str) -> None:
        """Appends a text sample."""
        with self._samples.open("a") as file:
            file.write(_SAMPLE_HEADER.format(step) + f"{text}\n\n")

    def close(self) -> None:
        """Flushes what is buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of `metrics.jsonl`, oldest first; a last line that was cut off is passed over."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def _open_tensorboard(run_dir: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)


class StatusDisplay:
    """A progress bar on a terminal; elsewhere a line per report."""

    def __init__(self, total: int, completed: int, *, enabled: bool = True) -> None:
        """Prepares the display.

        Args:
            total: steps of the run.
            completed: steps done before.
            enabled: print anything at all; only the first process of several does.
        """
        self._console = Console(highlight=False, quiet=not enabled, soft_wrap=True)
        self._total = total
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
            self._console.print(f"step {step}/{self._total} | {status}", markup=False)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False)


def format_seconds(seconds: float) -> str:
    """Such as 3:07 or 2:15:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
