"""Trains and judges the cells of an experiment, and keeps a record of every run."""

import concurrent.futures
import dataclasses
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mamba_jax.errors import InputError, brief, clean_line, reason
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.experiments.declaration import Cell, Experiment, Scale
from mamba_jax.experiments.records import Record, append, fingerprint, read
from mamba_jax.export.load import load_model
from mamba_jax.models import parameters
from mamba_jax.models.state import declare
from mamba_jax.report.run import read_run
from mamba_jax.run import loop
from mamba_jax.telemetry.setting import Setting, hardware

# What a process ends with that a signal has stopped: Ctrl-C, SIGTERM or SIGHUP.
_STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A cell with a seed.

    Attributes:
        experiment: name of the experiment.
        scale: see `Scale`.
        cell: what is trained.
        config: of the cell, with the run's seed, name and folder.
        fingerprint: see `mamba_jax.experiments.records.fingerprint`.
    """

    experiment: str
    scale: Scale
    cell: Cell
    config: ExperimentConfig
    fingerprint: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """See `Record.key`."""
        return self.scale, self.cell.name, self.config.seed, self.fingerprint

    @property
    def command(self) -> tuple[str, ...]:
        """The words behind `python` that make this run alone."""
        chosen = ("--scale", self.scale, "--only", self.cell.name, "--seeds", str(self.config.seed))
        return "-m", "mamba_jax.experiments", self.experiment, *chosen

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.experiment}, {self.cell.name}, seed {self.config.seed}"


def plan(name: str, scale: Scale, experiment: Experiment, seeds: Sequence[int], folder: Path) -> list[Run]:
    """The runs of an experiment, seed by seed.

    Args:
        name: of the experiment.
        scale: that it was made for.
        experiment: what it is.
        seeds: of the runs of each cell.
        folder: for the run directories.
    """
    runs = []
    for seed in seeds:
        for cell in experiment.cells:
            place = folder / name / f"{scale}-{cell.name}-{seed}"
            train = dataclasses.replace(cell.config.train, run_dir=str(place))
            config = dataclasses.replace(cell.config, name=f"{name}-{cell.name}", seed=seed, train=train)
            own = fingerprint(config, experiment.metrics)
            runs.append(Run(experiment=name, scale=scale, cell=cell, config=config, fingerprint=own))
    return runs


def unfinished(runs: Sequence[Run], path: Path) -> list[Run]:
    """The runs that have no record of having finished in a file."""
    finished = {record.key for record in read(path) if record.status == "finished"}
    return [run for run in runs if run.key not in finished]


def make(run: Run, experiment: Experiment, path: Path) -> int | None:
    """Trains and judges a run, and appends its record; one that cannot go on leaves a record of its failure.

    Args:
        run: the run.
        experiment: that it is of.
        path: file of the records.

    Returns:
        The signal that stopped it before its end, which leaves no record; None if none did.
    """
    print(f"{run.title}:", flush=True)
    try:
        result = loop.train(run.config)
        if result.stop_signal is not None:
            return result.stop_signal
        figures = dict(_figures(run, experiment))
    # The second is that of the device, such as too little memory for a metric.
    except (InputError, jax.errors.JaxRuntimeError) as error:
        record = _record(run, cause=brief(error))
    else:
        record = _record(run, figures=figures)
    print(f"{run.title}: {told(append(path, record))}", flush=True)
    return None


def make_beside_each_other(runs: Sequence[Run], path: Path, options: Sequence[str], jobs: int) -> None:
    """Makes every run by a process of its own, several at a time on the same device.

    A process that ends without a record leaves one of its failure. It prints into a `.log` beside its run directory.

    Args:
        runs: the runs.
        path: file of the records.
        options: further words for each process: where its files are.
        jobs: most processes at a time.
    """
    # Processes that take most of a GPU's memory at their start leave none to the others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_make_apart, run, path, options) for run in runs]):
            print(done.result(), flush=True)


def _make_apart(run: Run, path: Path, options: Sequence[str]) -> str:
    """Makes a run by a process of its own; returns what came of it, in a line."""
    log = Path(f"{run.config.train.run_dir}.log")
    before = _records_of(run, path)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            words = [sys.executable, *run.command, *options]
            status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        last = clean_line((log.read_text(errors="replace").splitlines() or [""])[-1])
    except OSError as error:
        raise InputError(f"cannot write {log} ({reason(error)}): choose another --runs") from None
    own = _records_of(run, path)[len(before) :]
    if not own and status not in _STOPPED:
        own = [append(path, _record(run, cause=f"its process ended with status {status}: {last}"))]
    return f"{run.title}: {told(own[-1]) if own else last}"


def _records_of(run: Run, path: Path) -> list[Record]:
    return [record for record in read(path) if record.key == run.key]


def told(record: Record) -> str:
    """What came of a run, in a line."""
    if record.cause is not None:
        return f"failed: {record.cause}"
    return ", ".join(f"{name} {value:.1f}" for name, value in record.figures.items())


def _figures(run: Run, experiment: Experiment) -> Iterator[tuple[str, float]]:
    """Name and value of each metric that is taken of the cell."""
    trained = load_model(run.config.train.run_dir)
    for metric in experiment.metrics:
        if metric.name not in run.cell.leaves_out:
            yield metric.name, metric.measure(trained)


def _record(run: Run, *, figures: dict[str, float] | None = None, cause: str | None = None) -> Record:
    """What there is to say of a run that has finished with these figures, or failed."""
    config, model = run.config, run.config.model
    seconds, steps = _seconds_and_steps(run)
    state = jax.tree.leaves(declare(model, batch_size=1, max_length=config.data.seq_len))
    return Record(
        experiment=run.experiment,
        scale=run.scale,
        cell=run.cell.name,
        seed=config.seed,
        fingerprint=run.fingerprint,
        status="failed" if figures is None else "finished",
        cause=cause,
        figures=figures or {},
        parameters=parameters.count(model),
        state_bytes=sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in state),
        steps=steps,
        tokens=steps * config.data.global_batch * config.data.seq_len,
        seconds=round(seconds, 1),
        setting=Setting.here(hardware(), libraries=("flax", "optax"), command=f"python {' '.join(run.command)}"),
    )


def _seconds_and_steps(run: Run) -> tuple[float, int]:
    """Time and updates of all starts of a run, as far as its records say."""
    try:
        found = read_run(Path(run.config.train.run_dir))
    except InputError:
        return 0.0, 0
    time = found.goodput
    return 0.0 if time is None else time.wall_seconds - time.seconds.get("down", 0.0), found.step
