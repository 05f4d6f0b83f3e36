"""What the benchmarks share: timing a program, saying what it ran on, and keeping the results.

A result is a line of JSON in `results/measurements.jsonl`. A run adds its own lines, and writes a table of them beside
that file. `compare.py` sets the last two results of a program on the same hardware side by side.
"""

import collections
import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pydantic

from mamba_jax.errors import InputError, reason
from mamba_jax.telemetry.records import append_whole
from mamba_jax.telemetry.setting import Setting as Setting
from mamba_jax.telemetry.setting import hardware as hardware
from mamba_jax.telemetry.setting import header as header
from mamba_jax.telemetry.setting import processor as processor

RESULTS = Path(__file__).parent / "results"
FILE_NAME = "measurements.jsonl"
MIB = 2**20


def setting_here(hardware: str, *, libraries: Sequence[str] = ()) -> Setting:
    """The setting of the benchmark that this process runs; see `Setting.here`."""
    return Setting.here(hardware, command=_command(sys.argv), libraries=libraries)


def _command(argv: Sequence[str]) -> str:
    """What a reader types to do the same; where the results went is a matter of the machine."""
    words, kept = iter(argv[1:]), []
    for word in words:
        if word == "--output":
            next(words, None)
        elif not word.startswith("--output="):
            kept.append(word)
    return f"python {shlex.join([f'benchmarks/{Path(argv[0]).name}', *kept])}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One result: a program, and what it cost.

    Attributes:
        op: what was measured: an op, or "training step".
        workload: its sizes and options; those that have a name start with it.
        implementation: of the op.
        direction: "forward", "forward + backward", or what else was run.
        milliseconds: of one call; None if nothing was timed.
        figures: other results by name and unit, in the order in which tables show them.
        setting: where, when and how.
    """

    op: str
    workload: str
    implementation: str
    direction: str
    milliseconds: float | None
    figures: dict[str, float | str]
    setting: Setting

    @property
    def program(self) -> tuple[str, ...]:
        """What two results must have in common to be compared."""
        return self.setting.hardware, self.op, self.workload, self.implementation, self.direction


_LINE = pydantic.TypeAdapter(Measurement)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one call in milliseconds: on the clock, and of the processor over all threads."""

    milliseconds: float
    cpu_milliseconds: float


def time_calls(
    call: Callable[[], Any],
    *,
    seconds: float,
    in_a_row: bool,
    wall: Callable[[], float] = time.perf_counter,
    cpu: Callable[[], float] = time.process_time,
) -> Timing:
    """Times a program, after one call that does not count, in which it may compile.

    Args:
        call: starts the program and returns what to wait for.
        seconds: to spend; there are three samples at least.
        in_a_row: start up to 20 calls (20 ms) without waiting in between, as a training step does, and give the
            median of their mean times; otherwise wait for every call and give the best.
        wall: clock in seconds.
        cpu: clock of the processor in seconds.
    """
    jax.block_until_ready(call())
    start = wall()
    jax.block_until_ready(call())
    calls = max(1, min(20, int(0.02 / max(wall() - start, 1e-6)))) if in_a_row else 1
    walls: list[float] = []
    cpus: list[float] = []
    while len(walls) < 3 or sum(walls) * calls < seconds:
        wall_start, cpu_start = wall(), cpu()
        result = None
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        walls.append((wall() - wall_start) / calls)
        cpus.append((cpu() - cpu_start) / calls)
    summary = statistics.median if in_a_row else min
    return Timing(milliseconds=1e3 * summary(walls), cpu_milliseconds=1e3 * summary(cpus))


def select_platform(device: str) -> None:
    """Makes JAX use this kind of device: "cpu", "gpu" or "tpu"."""
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))


class Results:
    """The results of one run of a benchmark."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        """Nothing yet.

        Args:
            folder: of the file of all results, and for the table; it is made.
            setting: of this run.
        """
        self.setting = setting
        self.measurements: list[Measurement] = []
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        op: str,
        workload: str,
        *,
        implementation: str,
        direction: str,
        milliseconds: float | None = None,
        **figures: float | str | None,
    ) -> None:
        """Keeps a result, so that a run that is cut short leaves what it has, and prints it.

        Args:
            op: see `Measurement`, as for all others.
            workload: sizes and options.
            implementation: of the op.
            direction: what was run.
            milliseconds: of one call.
            **figures: other results; None is left out, and an underscore stands for a space.
        """
        measurement = Measurement(
            op=op,
            workload=workload,
            implementation=implementation,
            direction=direction,
            milliseconds=milliseconds,
            figures={name.replace("_", " "): value for name, value in figures.items() if value is not None},
            setting=self.setting,
        )
        append(self._folder / FILE_NAME, measurement)
        self.measurements.append(measurement)
        print(op, workload, *_cells(measurement, list(measurement.figures)), sep=" | ", flush=True)

    def write_table(self, name: str, title: str, *notes: str) -> Path:
        """Writes the results of this run as a page; returns its path.

        Args:
            name: of the file, before the date.
            title: of the page.
            *notes: paragraphs on how to read it.
        """
        day = self.setting.date[:10]
        lines = [f"# {title}, {day}", "", *header(self.setting), "", *(part for note in notes for part in (note, ""))]
        path = self._folder / f"{name}_{day}.md"
        path.write_text("\n".join(lines) + "\n" + render(self.measurements))
        return path


def render(measurements: Sequence[Measurement]) -> str:
    """A table for every op and workload."""
    groups: dict[tuple[str, str], list[Measurement]] = collections.defaultdict(list)
    for measurement in measurements:
        groups[measurement.op, measurement.workload].append(measurement)
    lines = []
    for (op, workload), rows in groups.items():
        figures = list(dict.fromkeys(name for row in rows for name in row.figures))
        columns = ["implementation", "pass", "ms", *figures]
        lines += [f"## {op}, {workload}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cells(row, figures))} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def append(path: Path, measurement: Measurement) -> None:
    """Adds a line to a file of results.

    Raises:
        InputError: it cannot be written.
    """
    line = json.dumps(dataclasses.asdict(measurement), ensure_ascii=False)
    try:
        append_whole(path, [line.encode()])
    except OSError as error:
        raise InputError(f"cannot write results to {path} ({reason(error)}): choose another --output") from None


def read(path: Path) -> list[Measurement]:
    """All results of a file, oldest first.

    Raises:
        InputError: there is no such file, or a line is not a result.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"no results in {path} ({reason(error)}): run a benchmark first") from None
    measurements = []
    for number, line in enumerate(lines, start=1):
        try:
            measurements.append(_LINE.validate_json(line))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path}, line {number} is not a result ({f'{place}: ' if place else ''}{first['msg']}): remove it"
            ) from None
    return measurements


def _cells(measurement: Measurement, figures: Sequence[str]) -> list[str]:
    """A row: implementation, pass, milliseconds and some figures, empty where it has none."""
    values = [measurement.milliseconds, *(measurement.figures.get(name) for name in figures)]
    return [measurement.implementation, measurement.direction, *map(_written, values)]


def _written(value: float | str | None) -> str:
    """A value with four digits, or all before the point."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
