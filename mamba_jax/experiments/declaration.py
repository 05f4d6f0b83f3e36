"""What an experiment is: cells to train, metrics that judge each of them, and what was published."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

from mamba_jax.config_base import require
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.export.load import LoadedCheckpoint

# "reduced" is for two CPU cores, "short" for minutes of one GPU, "published" as in the paper.
Scale = Literal["reduced", "short", "published"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(abc.ABC):
    """A number that a trained model is judged by.

    Attributes:
        name: what the number is called in tables; different for all metrics of an experiment.
    """

    name: str

    @abc.abstractmethod
    def measure(self, trained: LoadedCheckpoint) -> float:
        """The number, of a run's newest checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of an experiment.

    Attributes:
        name: of the folder of its runs, and for `--only`.
        label: what tables call it.
        config: the run; seed, name and folder are set by the command.
        published: published numbers by the name of their metric.
        leaves_out: metrics that are not taken of it, and why, by their names.
        series: in pictures over the size of the state, the line that it is a point of.
    """

    name: str
    label: str
    config: ExperimentConfig
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    leaves_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    series: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Cells that are compared with each other and with published results.

    Attributes:
        title: heading of its results.
        source: the paper's section and table.
        about: a paragraph, the same at all scales: the task, the models, what differs from the paper.
        trained: the settings of this scale.
        cells: in the order of the tables.
        metrics: in the order of the tables.
        unit: of all metrics.
        picture: what is drawn: numbers over the metrics, over the size of the state, or beside each other.
    """

    title: str
    source: str
    about: str
    trained: str
    cells: tuple[Cell, ...]
    metrics: tuple[Metric, ...]
    unit: str = "%"
    picture: Literal["over_metrics", "over_state", "side_by_side"] = "over_metrics"

    def __post_init__(self) -> None:
        for what, found in (("cells", self.cells), ("metrics", self.metrics)):
            names = [each.name for each in found]
            twice = next((name for name in names if names.count(name) > 1), None)
            require(twice is None, f"{self.title}: two {what} are called {twice!r}; names must differ")
        known = {metric.name for metric in self.metrics}
        for cell in self.cells:
            unknown = sorted((cell.published.keys() | cell.leaves_out.keys()) - known)
            require(not unknown, f"{self.title}: {cell.name} has results of {', '.join(unknown)}, which are no metrics")
