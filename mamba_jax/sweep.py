"""Trains one run for every combination of values: python -m mamba_jax.sweep CONFIG --optimizer.peak-lr 1e-3 3e-3."""

import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from mamba_jax.cli import one_line_errors, print_result
from mamba_jax.config_files import load_config
from mamba_jax.errors import InputError, brief
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.export.initial import model_for
from mamba_jax.files import replacement
from mamba_jax.report.page import render
from mamba_jax.report.run import Run, read_run
from mamba_jax.report.swept import Outcome, plot_outcomes
from mamba_jax.run import distributed, loop, watchdog
from mamba_jax.run.directory import check_run_directory

_USAGE = """usage: {prog} CONFIG [--sweep-dir DIR] [--field value ...] [--field value value ...]

Trains CONFIG once for every combination of the values of the fields that have several, one after the other, each in a
folder of its own below DIR (runs/NAME_sweep by default). The same command goes on where it stopped and leaves finished
runs as they are. A table of all is printed at the end; DIR/report.html shows and compares them, and DIR/sweep.png has
their final losses against the values.
Fields are those of train.py, whose --help lists them; one with a single value or none is the same in all runs."""
_SWEEP_DIR = "--sweep-dir"
_RESERVED = ("--train.run-dir", "--train.run_dir", "--name")
# Longer names are cut by file systems.
_LONGEST_NAME = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: name of its folder and of the run.
        values: the value of each field that is varied, as it was typed, by the field's dotted name.
        config: the resolved experiment.
    """

    name: str
    values: Mapping[str, str]
    config: ExperimentConfig

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.config.train.run_dir)


def main(prog: str = "python -m mamba_jax.sweep") -> None:
    """Reads the command line, trains what is not finished, and shows all.

    Args:
        prog: what it is called by.
    """
    with one_line_errors():
        raise SystemExit(_main(sys.argv[1:], prog))


def _main(words: Sequence[str], prog: str) -> int:
    """The exit status: 0 if all runs are finished, 2 if one cannot be, 128 plus the signal that stopped it."""
    if {"--help", "-h"} & {*words}:
        print_result(_USAGE.format(prog=prog))
        return 0
    if not words or words[0].startswith("-"):
        raise InputError(f"missing CONFIG: {prog} CONFIG --field value value; --help says more")
    distributed.initialize()
    trials = plan(words[0], words[1:])
    failures: dict[str, str] = {}
    try:
        stopped = run_all(trials, failures)
    finally:
        watchdog.end_within(trials[0].config.faults.deadline_seconds)
    if jax.process_index() == 0:
        _show(trials, failures)
    if stopped is not None:
        return 128 + stopped
    return 2 if failures else 0


def plan(path: str, words: Sequence[str]) -> list[Trial]:
    """The runs of a sweep, all of whose configs and folders are checked before any of them begins.

    Args:
        path: the config file.
        words: flags with any number of values.

    Raises:
        InputError: a flag or value is wrong, a value is given twice, or a folder holds a run with another config.
    """
    flags = read_flags(words)
    if found := next((name for name in _RESERVED if name in flags), None):
        raise InputError(f"{found} is what a sweep gives to each of its runs: leave it out, {_SWEEP_DIR} is the place")
    given = flags.pop(_SWEEP_DIR, ["runs/{name}_sweep"])
    if len(given) != 1:
        raise InputError(f"{_SWEEP_DIR} takes one folder, got {' '.join(given) or 'none'}")
    fixed = [word for name, values in flags.items() if len(values) < 2 for word in (name, *values)]
    varied = {name: values for name, values in flags.items() if len(values) > 1}
    trials = []
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        config = load_config(path, [*fixed, *itertools.chain(*chosen.items())], model_for=model_for)
        name = _name(chosen) or config.name
        folder = Path(given[0].replace("{name}", config.name)) / name
        train = dataclasses.replace(config.train, run_dir=str(folder))
        config = dataclasses.replace(config, name=name, train=train)
        check_run_directory(config)
        trials.append(Trial(name=name, values={flag[2:]: value for flag, value in chosen.items()}, config=config))
    return trials


def read_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Flags in their order, each with its values; `--flag=value` is one with a single value.

    Raises:
        InputError: a word belongs to no flag, or a flag or one of its values is given twice.
    """
    flags: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, *values = word.split("=", 1)
            if name in flags:
                raise InputError(f"{name} is given twice: give all of its values at once, {name} 1 2 3")
            flags[name] = values
        elif name is None:
            raise InputError(f"{word!r} belongs to no flag; --help says more")
        else:
            flags[name].append(word)
    for name, values in flags.items():
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise InputError(f"{name} has the value {twice} twice: leave one out")
    return flags


def run_all(trials: Sequence[Trial], failures: dict[str, str]) -> int | None:
    """Trains what is not finished; a run that cannot go on leaves the others alone.

    Args:
        trials: all runs.
        failures: receives the one line that each run which failed ended with, by name.

    Returns:
        The signal that stopped the sweep; None if none did.
    """
    for number, trial in enumerate(trials, start=1):
        head = f"run {number} of {len(trials)}, {trial.name}"
        if distributed.from_first(functools.partial(_is_finished, trial)) == str(True):
            print(f"{head}: finished before", flush=True)
            continue
        print(f"{head}:", flush=True)
        try:
            result = loop.train(trial.config)
        except InputError as error:
            failures[trial.name] = str(error)
            print(f"{head} failed: {error}", file=sys.stderr, flush=True)
            continue
        if result.stop_signal is not None:
            return result.stop_signal
    return None


def table(trials: Sequence[Trial], failures: Mapping[str, str]) -> str:
    """A line for each run, those with the lowest held-out loss (or else training loss) first."""
    rows = []
    for trial in trials:
        run = _read(trial)
        loss, held_out, bits = _last_losses(run)
        status = "failed" if trial.name in failures else "not begun" if run is None else run.status
        numbers = ["" if value is None else f"{value:.4f}" for value in (loss, held_out, bits)]
        order = (held_out is None, held_out if held_out is not None else loss or float("inf"))
        rows.append((order, [*trial.values.values(), *numbers, status]))
    header = [*trials[0].values, "loss", "held-out", "bits/byte", "status"]
    lines = [header, *(row for _, row in sorted(rows, key=lambda row: row[0]))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _last_losses(run: Run | None) -> tuple[float | None, float | None, float | None]:
    """Training loss, held-out loss and bits per byte at the end of a run, as far as it has them."""
    if run is None:
        return None, None, None
    return run.last("train", "cross_entropy"), run.last("validation", "loss"), run.last("validation", "bits_per_byte")


def _plot(trials: Sequence[Trial]) -> str:
    """Draws the losses against the values; returns what to say of it."""
    path = trials[0].folder.parent / "sweep.png"
    outcomes = []
    for trial in trials:
        loss, held_out, _ = _last_losses(_read(trial))
        outcomes.append(Outcome(values=trial.values, loss=loss, held_out=held_out))
    try:
        return f" and {path}" if plot_outcomes(path, outcomes, title=path.parent.name) else ""
    # The table and the page say the same.
    except Exception as error:
        return f"; no picture {path} ({brief(error)})"


def _show(trials: Sequence[Trial], failures: Mapping[str, str]) -> None:
    """Writes the page of all runs that have begun, and prints the table."""
    runs = [run for run in map(_read, trials) if run is not None]
    output = trials[0].folder.parent / "report.html"
    if runs:
        try:
            with replacement(output) as temporary:
                temporary.write_bytes(render(runs).encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise InputError(f"cannot write {output} ({error.strerror}): make room there, and run it again") from None
    print_result(table(trials, failures) + (f"\nwrote {output}{_plot(trials)}" if runs else ""))


def _read(trial: Trial) -> Run | None:
    try:
        return read_run(trial.folder)
    except InputError:
        return None


def _is_finished(trial: Trial) -> bool:
    run = _read(trial)
    return run is not None and run.finished_step == trial.config.train.num_steps


def _name(values: Mapping[str, str]) -> str:
    """Name of a run's folder: its varied fields and their values, with what a path cannot hold as a hyphen.

    Raises:
        InputError: it is longer than a folder's name may be.
    """
    short = [flag.rpartition(".")[2].removeprefix("--") for flag in values]
    fields = [flag[2:] if short.count(name) > 1 else name for flag, name in zip(values, short, strict=True)]
    pairs = [f"{field}={value}" for field, value in zip(fields, values.values(), strict=True)]
    name = re.sub(r"[^\w.,=+-]", "-", ",".join(pairs), flags=re.ASCII)
    if len(name) > _LONGEST_NAME:
        raise InputError(f"{name} is too long for a folder's name: vary fewer fields at once, or shorter values")
    return name


if __name__ == "__main__":
    main()
