"""Pictures of an experiment's results, with the published numbers as dashed lines or crosses."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mamba_jax.experiments.declaration import Cell, Experiment
from mamba_jax.experiments.records import Record
from mamba_jax.files import replacement

Finished = Mapping[str, Sequence[Record]]


def draw(path: Path, experiment: Experiment, finished: Finished) -> None:
    """Draws the results of the cells that have any.

    Args:
        path: the picture to write.
        experiment: says what is drawn.
        finished: records of each cell by its name.

    Raises:
        OSError: the picture cannot be written; an older one stays.
    """
    # Imported here: it takes a second, and reads settings of the environment.
    from matplotlib.figure import Figure

    cells = [cell for cell in experiment.cells if finished[cell.name]]
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    {"over_metrics": _over_metrics, "over_state": _over_state, "side_by_side": _side_by_side}[experiment.picture](
        axes, experiment, cells, finished
    )
    axes.grid(alpha=0.3)
    axes.set_title(experiment.title)
    with replacement(path, mark=f".{os.getpid()}") as temporary:
        figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})


def _mean(records: Sequence[Record], name: str) -> float | None:
    """Over the seeds; None if no record has the number."""
    values = [record.figures[name] for record in records if name in record.figures]
    return sum(values) / len(values) if values else None


def _over_metrics(axes: Any, experiment: Experiment, cells: Sequence[Cell], finished: Finished) -> None:
    """A line for each cell over the metrics, and a dashed one of its published numbers."""
    names = [metric.name for metric in experiment.metrics]
    for cell in cells:
        (line,) = axes.plot([_mean(finished[cell.name], name) for name in names], marker="o", label=cell.label)
        if cell.published:
            axes.plot([cell.published.get(name) for name in names], "--", color=line.get_color(), alpha=0.5)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=f"accuracy ({experiment.unit}), dashed: paper")
    axes.legend(fontsize="small")


def _over_state(axes: Any, experiment: Experiment, cells: Sequence[Cell], finished: Finished) -> None:
    """The first metric over the bytes of the state; a line for each series."""
    name = experiment.metrics[0].name
    for series in dict.fromkeys(cell.series for cell in cells):
        points = sorted(
            (finished[cell.name][0].state_bytes, value)
            for cell in cells
            if cell.series == series and (value := _mean(finished[cell.name], name)) is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=series)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="state of a row (bytes)", ylabel=f"{name} ({experiment.unit})")
    axes.legend(fontsize="small")


def _side_by_side(axes: Any, experiment: Experiment, cells: Sequence[Cell], finished: Finished) -> None:
    """A bar for each cell with the first metric, and a cross at the published number."""
    name = experiment.metrics[0].name
    labels = [cell.label for cell in cells]
    axes.barh(labels, [_mean(finished[cell.name], name) or 0.0 for cell in cells], height=0.6, label="ours")
    published = [(cell.published[name], cell.label) for cell in cells if name in cell.published]
    if published:
        axes.plot(*zip(*published, strict=True), "kx", label="paper")
    axes.invert_yaxis()
    axes.set(xlabel=f"{name} ({experiment.unit})")
    axes.legend(fontsize="small")
