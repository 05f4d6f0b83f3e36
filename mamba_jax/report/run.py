"""What the files of a run directory say, as far as they are there."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mamba_jax.errors import InputError
from mamba_jax.run.record import Lineage, read_record
from mamba_jax.telemetry.events import read_events
from mamba_jax.telemetry.goodput import GoodputSummary, summarize
from mamba_jax.telemetry.metrics import read_metrics, read_samples
from mamba_jax.telemetry.records import parse_objects

# Of float32, in which runs compute: a picture has no use for what is beyond, and can have trouble with it.
_LARGEST, _SMALLEST = 3.4e38, 1e-45


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One number over the steps.

    Attributes:
        steps: updates done, ascending, each once.
        values: as many; NaN and infinities included.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float | None:
        """The newest finite value; None if there is none."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its files tell it.

    Attributes:
        name: name in the config, or else that of the folder.
        folder: the run directory.
        config: each value of the config as JSON text, by dotted name.
        num_steps: planned number of steps; None if the config does not say.
        series: curve of each metric by (kind, name), such as ("train", "grad_norm").
        events: events of all starts, oldest first.
        samples: (step, text) of each sample, oldest first.
        goodput: where the time went; None without events.
        lineage: what the run began with; None for random weights.
    """

    name: str
    folder: Path
    config: dict[str, str]
    num_steps: int | None
    series: dict[tuple[str, str], Series]
    events: list[dict[str, Any]]
    samples: list[tuple[int, str]]
    goodput: GoodputSummary | None
    lineage: Lineage | None = None

    @property
    def step(self) -> int:
        """The last step that has metrics; 0 if none has."""
        steps = [int(series.steps[-1]) for series in self.series.values() if series.steps.size]
        return max(steps, default=0)

    @property
    def finished_step(self) -> int | None:
        """The step at which it came to its end; None if it has not, or was started again since."""
        ending = self._ending()
        if ending is not None:
            return ending.get("step", self.step) if ending["event"] == "finished" else None
        is_done = not self.events and self.num_steps is not None and self.step >= self.num_steps
        return self.step if is_done else None

    @property
    def status(self) -> str:
        """How the run stands, in a few words."""
        if (finished := self.finished_step) is not None:
            return f"finished at step {finished:,}"
        ending = self._ending()
        if ending is None:
            return f"running, or killed, at step {self.step:,}"
        step = ending.get("step", self.step)
        if ending["event"] == "aborted":
            return f"aborted at step {step:,}: {ending.get('reason', 'no reason given')}"
        return f"stopped and saved at step {step:,}"

    def _ending(self) -> dict[str, Any] | None:
        """The event that ended its newest start; None if nothing tells of an end."""
        for event in reversed(self.events):
            if event["event"] in ("finished", "aborted", "preempted"):
                return event
            if event["event"] == "start":
                break
        return None

    def last(self, kind: str, name: str) -> float | None:
        """Newest finite value of a series; None if there is none."""
        series = self.series.get((kind, name))
        return None if series is None else series.last


def read_run(folder: Path) -> Run:
    """Reads what is there: any file may be missing, cut off, damaged, or still growing.

    Args:
        folder: `train.run_dir` of a run.

    Raises:
        InputError: the folder is missing, cannot be read or holds no run.
    """
    try:
        if not folder.is_dir():
            raise InputError(f"no folder {str(folder)!r}: give the train.run_dir of a run")
        return _read(folder)
    except OSError as error:
        place = str(error.filename or folder)
        raise InputError(
            f"cannot read {place!r} ({error.strerror or error}): give the train.run_dir of a run"
        ) from None


def read_runs(folder: Path) -> list[Run]:
    """The run in a folder; if it holds none itself, those in the folders right below it, by name.

    Raises:
        InputError: the folder is missing, cannot be read, or there is no run in either place.
    """
    try:
        return [read_run(folder)]
    except InputError:
        below = sorted(path.parent for path in folder.glob("*/config.json"))
        runs = [read_run(path) for path in below if (path / "events.jsonl").is_file()]
        if not runs:
            raise
        return runs


def _read(folder: Path) -> Run:
    """Collects all that the files of a run directory tell; raises an InputError if it holds no run."""
    config = _read_config(folder)
    files = [name for name in ("metrics.jsonl", "events.jsonl") if (folder / name).is_file()]
    if not files and not isinstance(config.get("train"), dict):
        raise InputError(
            f"{str(folder)!r} holds no run (no metrics.jsonl, no config.json of one): give a train.run_dir"
        )
    events = read_events(folder)
    flat = _flatten(config)
    record = read_record(folder)
    name, num_steps = config.get("name"), flat.get("train.num_steps", "")
    return Run(
        name=name if isinstance(name, str) and name.strip() else folder.resolve().name,
        folder=folder,
        config=flat,
        num_steps=int(num_steps) if re.fullmatch(r"\d{1,15}", num_steps, re.ASCII) else None,
        series=_read_series(folder),
        events=events,
        samples=read_samples(folder),
        goodput=summarize(events) if any(event["event"] == "start" for event in events) else None,
        lineage=None if record is None else record.lineage,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Plain JSON, unchecked: a run of another version of the program is shown all the same."""
    path = folder / "config.json"
    (config,) = parse_objects([path.read_bytes() if path.is_file() else b""])
    return config or {}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat


def _read_series(folder: Path) -> dict[tuple[str, str], Series]:
    """All logged values by kind of record and name, each in the order of its steps."""
    # A resume on a full disk can leave a step twice: the newer record, further down, counts.
    records = {(record["kind"], record["step"]): record for record in read_metrics(folder)}
    columns: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for (kind, step), record in records.items():
        for name, value in record.items():
            if name not in ("kind", "step"):
                steps, values = columns.setdefault((kind, name), ([], []))
                steps.append(step)
                values.append(value)
    result = {}
    for key, (steps, values) in columns.items():
        order = np.argsort(steps, kind="stable")
        result[key] = Series(steps=np.array(steps)[order], values=_drawable(np.array(values, np.float64)[order]))
    return result


def _drawable(values: np.ndarray) -> np.ndarray:
    size = np.abs(values)
    return np.where(size > _LARGEST, np.copysign(np.inf, values), np.where(size < _SMALLEST, 0.0, values))
