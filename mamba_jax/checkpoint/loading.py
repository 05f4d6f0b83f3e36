"""Reads checkpoints for other programs than the run that wrote them, which may still be training."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import SingleDeviceSharding

from mamba_jax.checkpoint import record as records
from mamba_jax.checkpoint.agreement import from_first, same_for_all
from mamba_jax.checkpoint.arrays import read_arrays
from mamba_jax.checkpoint.damage import CheckpointGone, DamagedCheckpoint
from mamba_jax.checkpoint.steps import FOLDER, check_path, steps_in
from mamba_jax.config_base import from_json
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.models.parameters import Params, define
from mamba_jax.models.storage.low_rank import adapted, merged

_ITEM = {"weights": "params", "average": "ema"}
# If a checkpoint is removed while it is read, a newer one exists and is tried. Twenty in a row means that the run
# removes checkpoints faster than they can be read.
_TRIES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedParams:
    """Parameters out of a training checkpoint.

    Attributes:
        config: the experiment that made them.
        params: on the first local device; those of the model, into which adapters are merged.
        step: updates done.
        stored: the same as the run stores them, with a `LowRank` where there is an adapter.
        run: id of the run that made them; None if it recorded none.
    """

    config: ExperimentConfig
    params: Params
    step: int
    stored: Params
    run: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRun:
    """What a checkpoint says about the run that wrote it.

    Attributes:
        config: the resolved experiment.
        identity: as it was given to `Checkpointer`.
        step: updates done.
    """

    config: ExperimentConfig
    identity: Mapping[str, Any] | None
    step: int


def load_params(
    run_dir: str | Path, step: int | None = None, *, weights: Literal["weights", "average"] = "weights"
) -> LoadedParams:
    """Reads the parameters of a run onto the first local device; the run may still be training.

    Args:
        run_dir: the run directory.
        step: which checkpoint; None takes the newest.
        weights: "weights" for the parameters after the last update, "average" for their moving average.

    Raises:
        InputError: the run has no such checkpoint or keeps no average, or the checkpoint is damaged, cannot be read now
            or does not hold the arrays of its config.
    """
    check_path(run_dir)
    for _ in range(_TRIES):
        folder = _choose(Path(run_dir), step)
        try:
            return _load(folder, weights)
        except CheckpointGone:
            continue
        except DamagedCheckpoint as error:
            raise InputError(f"{error}: move that folder away to use the one before it") from error
    raise InputError(
        f"{run_dir} removes its checkpoints before they are read: copy one of them aside, or raise checkpoint.keep"
    )


def stored_run(run_dir: str | Path) -> StoredRun | None:
    """Config, identity and step from the newest checkpoint of a run that is not damaged; reads no arrays.

    Each process reads for itself, without waiting for the others.

    Args:
        run_dir: the run directory.

    Returns:
        None if the run has no readable checkpoint.

    Raises:
        InputError: a checkpoint cannot be read now, or its config is of another version.
    """
    for step in reversed(steps_in(Path(run_dir) / FOLDER)):
        folder = Path(run_dir) / FOLDER / str(step)
        try:
            record = records.read(folder)
        except (CheckpointGone, DamagedCheckpoint):
            continue
        records.check_step(record, folder)
        return StoredRun(config=_config(record, folder), identity=record.identity, step=step)
    return None


def stored_step(run_dir: str | Path, step: int) -> StoredRun:
    """Config and identity of a run at one of its steps; reads no arrays. All processes return, or all raise the same.

    Raises:
        InputError: the run has no such checkpoint (those that it has are named), or it is damaged or unreadable.
    """
    check_path(run_dir)
    folder = _choose(Path(run_dir), step)
    with same_for_all():
        record = records.read(folder)
        records.check_step(record, folder)
        return StoredRun(config=_config(record, folder), identity=record.identity, step=step)


def load_state(run_dir: str | Path, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the state that a run had at one of its steps, for another run that goes on from there.

    Args:
        run_dir: the run directory.
        step: which checkpoint.
        abstract: trees of `jax.ShapeDtypeStruct` with shardings, by name of the item.

    Returns:
        The arrays, in the same trees.

    Raises:
        InputError: the run has no such checkpoint, or it is damaged, cannot be read now or holds other arrays.
    """
    try:
        return read_arrays(_choose(Path(run_dir), step), abstract, identity=None)
    except DamagedCheckpoint as error:
        raise InputError(f"{error}: take another step of {run_dir}") from error


def _choose(run_dir: Path, step: int | None) -> Path:
    """Folder of the checkpoint of `step`, or of the newest one; the first process chooses for all."""
    with same_for_all():
        steps = steps_in(run_dir / FOLDER)
        if not steps and not (run_dir / FOLDER).is_dir():
            raise InputError(f"{run_dir} is not a run directory: it has no folder {FOLDER!r}")
        if not steps:
            raise InputError(f"{run_dir} has no complete checkpoint yet")
        if step is not None and step not in steps:
            raise InputError(f"{run_dir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return run_dir / FOLDER / str(from_first(steps[-1] if step is None else step))


def _load(folder: Path, weights: Literal["weights", "average"]) -> LoadedParams:
    """Reads a checkpoint's trained parameters, or their moving average, onto the first device of this process."""
    with same_for_all():
        record = records.read(folder)
        records.check_step(record, folder)
        config = _config(record, folder)
        if weights == "average" and config.optimizer.ema_decay is None:
            raise InputError(f"{folder.parent.parent} keeps no average of the weights: optimizer.ema_decay was not set")
    item = _ITEM[weights]
    abstract = {item: _on_first_device(adapted(define(config.model), config.lora).params)}
    stored = read_arrays(folder, abstract, identity=None)[item]
    return LoadedParams(
        config=config,
        params=merged(stored),
        step=record.step,
        stored=stored,
        run=(record.identity or {}).get("run"),
    )


def _config(record: records.Record, folder: Path) -> ExperimentConfig:
    return from_json(ExperimentConfig, json.dumps(record.config), origin=f"checkpoint {folder}")


def _on_first_device(abstract: Params) -> Params:
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
