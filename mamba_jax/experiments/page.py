"""The page of all results: every figure in it comes from the files of records."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mamba_jax.errors import InputError, brief, reason
from mamba_jax.experiments.declaration import Cell, Experiment, Scale
from mamba_jax.experiments.pictures import draw
from mamba_jax.experiments.records import Record, fingerprint, read
from mamba_jax.files import replacement

_HEAD = """# Results

Experiments of the papers, made by `python -m mamba_jax.experiments NAME`: the command trains every cell with the
trainer of `train.py`, judges it on rows that training never sees, adds a line to a file in `results/` for every
run, and writes this page and its pictures from these lines. Nothing here is written by hand. Finished cells are kept;
the same command goes on where it was stopped. `--scale` chooses the size: `reduced` is for two CPU cores, `short` for
minutes of one GPU, `published` as in the paper. `--list` names the experiments and their cells; a cell is a config,
and `configs/experiments/` holds them.

A row "paper" has the published numbers, also beside runs that are smaller than the paper's. Where a table has several
seeds of a model, a number is their mean, with the least and the most in parentheses. A dash says that a number was
not taken. Seconds are those of a run's own process, with compilation; where `--jobs` has several processes share a
device, a run alone is faster.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Records that are compared with each other.

    Attributes:
        scale: of all.
        hardware: of all.
        experiment: at this scale.
        finished: of each cell those with its present config, the newest of each seed, by the cell's name.
    """

    scale: Scale
    hardware: str
    experiment: Experiment
    finished: Mapping[str, Sequence[Record]]

    @property
    def cells(self) -> list[Cell]:
        """The cells that have finished."""
        return [cell for cell in self.experiment.cells if self.finished[cell.name]]


def write_page(output: Path, experiments: Mapping[str, Callable[[Scale], Experiment]]) -> Path:
    """Writes `results.md` and the pictures from the records in `results/`; returns the page's path.

    Args:
        output: the folder of both.
        experiments: by name, a function that gives the experiment at a scale.

    Raises:
        InputError: records cannot be read, or the page not be written.
    """
    page = output / "results.md"
    parts = [_HEAD]
    try:
        for name, make in experiments.items():
            records = read(output / "results" / f"{name}.jsonl")
            if records:
                parts += _section(name, make, records, output / "results")
        output.mkdir(parents=True, exist_ok=True)
        with replacement(page, mark=f".{os.getpid()}") as temporary:
            temporary.write_text("\n".join(parts))
    except OSError as error:
        raise InputError(f"cannot write {page} ({reason(error)}): choose another --output") from None
    return page


def _section(name: str, make: Callable[[Scale], Experiment], records: Sequence[Record], folder: Path) -> Iterator[str]:
    """The lines on one experiment."""
    any_scale = make(records[0].scale)
    yield f"## {any_scale.title}\n\nSource: {any_scale.source}. {any_scale.about}\n"
    places = dict.fromkeys((record.scale, record.setting.hardware) for record in records)
    for scale, hardware in places:
        own = [record for record in records if (record.scale, record.setting.hardware) == (scale, hardware)]
        group = _group(make(scale), own)
        yield f"### {any_scale.title}: {scale} scale, {hardware}\n"
        yield f"{group.experiment.trained}\n"
        if group.cells:
            picture = f"{name}_{scale}_{_slug(hardware)}.png"
            yield f"`python -m mamba_jax.experiments {name} --scale {scale}{_seeds(group)}`\n"
            yield from _comparison(group)
            if _drawn(folder / picture, group):
                yield f"![{any_scale.title}, {scale} scale](results/{picture})\n"
        yield from _runs(own)


def _drawn(path: Path, group: Group) -> bool:
    """Whether the picture could be drawn: the tables say the same, and are not to be lost for want of it."""
    try:
        draw(path, group.experiment, group.finished)
    except Exception as error:
        print(f"no picture {path} ({brief(error)})", file=sys.stderr, flush=True)
        return False
    return True


def _slug(text: str) -> str:
    return "-".join("".join(char if char.isalnum() else " " for char in text.split(",")[0].lower()).split())


def _seeds(group: Group) -> str:
    """The flag that chooses the seeds of a group; nothing for the default."""
    seeds = sorted({record.seed for records in group.finished.values() for record in records})
    return "" if seeds == [0] else f" --seeds {' '.join(map(str, seeds))}"


def _group(experiment: Experiment, records: Sequence[Record]) -> Group:
    """Records of one scale and hardware, sorted by cell."""
    finished = {}
    for cell in experiment.cells:
        own = [record for record in records if record.cell == cell.name and record.status == "finished"]
        present = {
            record.seed: record
            for record in own
            if record.fingerprint == fingerprint(dataclasses.replace(cell.config, seed=record.seed), experiment.metrics)
        }
        finished[cell.name] = [present[seed] for seed in sorted(present)]
    return Group(scale=records[0].scale, hardware=records[0].setting.hardware, experiment=experiment, finished=finished)


def _comparison(group: Group) -> Iterator[str]:
    """The table of our numbers and the published ones."""
    names = [metric.name for metric in group.experiment.metrics]
    unit = f" ({group.experiment.unit})" if group.experiment.unit else ""
    lines = [["model", "parameters", "state, bytes", "seeds", *(f"{name}{unit}" for name in names)]]
    for cell in group.cells:
        records = group.finished[cell.name]
        first = records[0]
        figures = [_of_seeds([record.figures[name] for record in records if name in record.figures]) for name in names]
        head = [cell.label, f"{first.parameters:,}", f"{first.state_bytes:,}", f"{len(records)}"]
        lines.append([*head, *figures])
        if cell.published:
            published = [f"{cell.published[name]:g}" if name in cell.published else "-" for name in names]
            lines.append(["paper", "", "", "", *published])
    yield _table(lines)
    for cell in group.cells:
        for why in dict.fromkeys(cell.leaves_out.values()):
            without = [name for name in names if cell.leaves_out.get(name) == why]
            yield f"{cell.label} has no {', '.join(without)}: {why}.\n"
    if missing := [cell.label for cell in group.experiment.cells if cell not in group.cells]:
        yield f"No run has finished yet of: {'; '.join(missing)}.\n"


def _of_seeds(values: Sequence[float]) -> str:
    """The mean, and the least and the most where they differ."""
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.1f}"
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return mean if low == high else f"{mean} ({low} to {high})"


def _runs(records: Sequence[Record]) -> Iterator[str]:
    """The table of all runs that were made, the failed ones with their cause."""
    lines = [["run", "seed", "steps", "seconds", "tokens/s", "result", "commit", "date"]]
    for record in records:
        speed = f"{record.tokens / record.seconds:,.0f}" if record.seconds else "-"
        result = record.status if record.cause is None else f"failed: {record.cause}".replace("|", "\\|")
        counts = [str(record.seed), f"{record.steps:,}", f"{record.seconds:,.0f}", speed]
        lines.append([record.cell, *counts, result, record.setting.commit, record.setting.date[:10]])
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in record.setting.versions.items()) for record in records
    )
    yield f"All runs; a run alone is made by adding `--only RUN`. Software: {'; '.join(versions)}.\n"
    yield _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows, ""])
