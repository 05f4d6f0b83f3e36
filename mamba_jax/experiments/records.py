"""The file of an experiment's results: a line of JSON for every run that was made, also those that failed."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic

from mamba_jax.config_base import to_json
from mamba_jax.errors import InputError, reason
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.experiments.declaration import Metric, Scale
from mamba_jax.telemetry.records import append_whole
from mamba_jax.telemetry.setting import Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What came of a run.

    Attributes:
        experiment: name of its file.
        scale: see `Scale`.
        cell: name of the cell.
        seed: of the run.
        fingerprint: of its config and of the metrics.
        status: "finished" or "failed".
        cause: the line that a run which failed ended with; None if it did not.
        figures: numbers by the names of the metrics.
        parameters: of the model.
        state_bytes: what the model remembers of a row of the length that it was trained on.
        steps: updates.
        tokens: that were trained on.
        seconds: of training, over all starts of the run, with compilation and without metrics.
        setting: where, when and how.
    """

    experiment: str
    scale: Scale
    cell: str
    seed: int
    fingerprint: str
    status: Literal["finished", "failed"]
    cause: str | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    parameters: int
    state_bytes: int
    steps: int
    tokens: int
    seconds: float
    setting: Setting

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What a run is the only one of: its cell at a scale, its seed and its config."""
        return self.scale, self.cell, self.seed, self.fingerprint


_RECORD = pydantic.TypeAdapter(Record)


def fingerprint(config: ExperimentConfig, metrics: Sequence[Metric]) -> str:
    """Of all that a run's figures depend on, and so not of its name and place."""
    train = dataclasses.replace(config.train, run_dir="")
    text = to_json(dataclasses.replace(config, name="", train=train), indent=None)
    return hashlib.sha256(f"{text} {metrics}".encode()).hexdigest()[:16]


def append(path: Path, record: Record) -> Record:
    """Adds a record to a file, and returns it; several processes may do so at the same time.

    Raises:
        InputError: it cannot be written.
    """
    line = json.dumps(dataclasses.asdict(record), ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_whole(path, [line.encode()])
    except OSError as error:
        raise InputError(f"cannot write results to {path} ({reason(error)}): choose another --output") from None
    return record


def read(path: Path) -> list[Record]:
    """The records of a file, oldest first; none if there is no such file.

    Raises:
        InputError: the file cannot be read, or a line is no record.
    """
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise InputError(f"cannot read results in {path} ({reason(error)})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_RECORD.validate_json(line))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}, line {number} is no result ({place} {first['msg']}): remove it") from None
    return records
