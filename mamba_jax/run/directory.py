"""The run directory: checks that it is free or holds a run that this config may continue; config and record files.

The order of calls in `mamba_jax.run.loop.train`: `check_is_run_or_free`, then as the owner `begins_at_zero`,
`settle_run`, perhaps `set_aside`, and at last `claim_run_directory` and `store_record`.
"""

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mamba_jax.checkpoint import FOLDER, StoredRun, check_path, newest_step, stored_run
from mamba_jax.config_base import from_json, to_json
from mamba_jax.errors import InputError, reason
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.files import replacement
from mamba_jax.run.changes import check_extension, is_of_schedule, result_changes
from mamba_jax.run.distributed import from_first, raise_in_all
from mamba_jax.run.ownership import LOCK, OWNER
from mamba_jax.run.record import (
    RECORD,
    Lineage,
    RunRecord,
    check_may_begin,
    data_problem,
    from_identity,
    from_text,
    has_recorded_steps,
    read_record,
    to_text,
    write_record,
)

_CONFIG = "config.json"

# Files that do not make a folder a foreign one: those that an aborted start leaves, and those of the file system
# itself.
_HARMLESS = {LOCK, OWNER, "lost+found", ".snapshot"}
_HARMLESS_STARTS = (f".{_CONFIG}", f".{RECORD}", f".{OWNER}", ".nfs")

# Everything that a run writes, in the order in which `set_aside` moves it. A folder counts as a run by its last two, so
# if moving is interrupted, the folder still counts as a run.
_RECORDS = (
    FOLDER,
    "damaged",
    "metrics.jsonl",
    "samples.txt",
    "loss_curve.png",
    "tensorboard",
    "profile",
    "events.jsonl",
    RECORD,
    _CONFIG,
)


def check_run_directory(config: ExperimentConfig, *, from_scratch: bool = False) -> None:
    """Makes sure that the run directory is free, or that the run in it is the one that `config` describes.

    Args:
        config: `config.train.run_dir` is the directory; the other fields are compared with those of the run in it,
            except for those that do not change the result, or only that of steps to come (`mamba_jax.run.changes`).
        from_scratch: the run in the directory is going to be set aside, so it may have another config.

    Raises:
        InputError: the path is not a folder, cannot be read, holds something other than a run, or holds a run with a
            config that gives another result; the message names the fields.
    """
    run_dir = Path(config.train.run_dir)
    check_is_run_or_free(config)
    with _reading(run_dir):
        if not from_scratch:
            _check_config(config, run_dir)


def check_is_run_or_free(config: ExperimentConfig) -> None:
    """Makes sure that the run directory is missing, empty, or holds some run; its config is not compared.

    Raises:
        InputError: the path is not a folder, cannot be read, or holds something other than a run.
    """
    run_dir = config.train.run_dir
    if "://" in run_dir:
        raise InputError(
            f"train.run_dir {run_dir} is an address, but a folder is needed: mount the storage and name "
            "the folder (docs/running_on_a_pod.md)"
        )
    check_path(run_dir)
    with _writing(run_dir):
        # Fails now rather than later if a string in the config cannot be written as UTF-8.
        to_json(config)
    with _reading(run_dir):
        _check_content(Path(run_dir))


def begins_at_zero(config: ExperimentConfig, *, from_scratch: bool) -> bool:
    """Whether training begins at step 0 in the run directory, after `check_run_directory`; False if it resumes.

    Call it as the owner of the directory (`mamba_jax.run.ownership`), so that no other job changes the answer.

    Args:
        config: `config.train.run_dir` is the directory.
        from_scratch: the run in the directory is going to be set aside, so training begins at step 0 in any case.

    Raises:
        InputError: see `check_run_directory`; or the run in the directory was saved once, but its checkpoints are gone.
    """
    check_run_directory(config, from_scratch=from_scratch)
    run_dir = Path(config.train.run_dir)
    with _reading(run_dir):
        if from_scratch:
            return True
        begins = newest_step(run_dir) is None
        if begins:
            check_may_begin(run_dir, read_record(run_dir))
        return begins


def settle_run(
    config: ExperimentConfig, data: Mapping[str, Any], *, from_scratch: bool, lineage: Lineage | None = None
) -> RunRecord:
    """The record of the run that begins or resumes in the run directory; call it after `begins_at_zero`.

    The first process decides, and all processes return the same record.

    Args:
        config: `config.train.run_dir` is the directory.
        data: identity of the training data, see `TokenDataset.identity`.
        from_scratch: make a new record, whatever the directory holds.
        lineage: where the run comes from, if it begins; None if from nothing.

    Returns:
        The record; its field `saved` is None if the run begins.

    Raises:
        InputError: the run that would be resumed was trained on other data.
    """
    run_dir = Path(config.train.run_dir)

    def settle() -> str:
        with _reading(run_dir):
            return to_text(RunRecord.new(data, lineage) if from_scratch else _find_run(run_dir, data, lineage))

    record = from_text(from_first(settle))
    raise_in_all(data_problem(run_dir, record.data, data))
    return record


def _find_run(run_dir: Path, data: Mapping[str, Any], lineage: Lineage | None) -> RunRecord:
    """The record of the run in the directory, else that of its newest checkpoint, else a new one."""
    record, newest = read_record(run_dir), newest_step(run_dir)
    if newest is None and not has_recorded_steps(run_dir):
        return RunRecord.new(data, lineage)
    if record is None and (stored := _stored_run(run_dir)) is not None:
        record = from_identity(stored.identity)
    if record is None:
        record = RunRecord.new(data)
    if newest is None:
        record = dataclasses.replace(record, lineage=lineage)
    saved = None if newest is None else max(newest, record.saved or 0)
    return dataclasses.replace(record, data=record.data or data, saved=saved)


def schedule_changes(config: ExperimentConfig) -> list[str]:
    """What a run that is extended changes of its schedule, a phrase for each field; call it before the claim."""
    run_dir = Path(config.train.run_dir)
    with _reading(run_dir):
        stored = _read_config(run_dir)
    return list(result_changes(stored, config).values()) if isinstance(stored, ExperimentConfig) else []


def claim_run_directory(config: ExperimentConfig) -> Path:
    """Creates the run directory if it is missing, and stores the config there; later starts are compared with it.

    Call it after every check has passed, because a stored config makes the folder count as a run.

    Returns:
        The run directory.

    Raises:
        InputError: the folder cannot be created or written to; its files stay as they were.
    """
    run_dir = Path(config.train.run_dir)
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        with replacement(run_dir / _CONFIG, mark=f".{uuid.uuid4().hex}") as temporary:
            temporary.write_text(to_json(config) + "\n")
    return run_dir


def store_record(run_dir: Path, record: RunRecord) -> None:
    """Writes `run.json`, which says which run the directory holds.

    Raises:
        InputError: the folder cannot be written to; its files stay as they were.
    """
    with _writing(run_dir):
        write_record(run_dir, record)


def set_aside(run_dir: Path) -> Path | None:
    """Moves everything a run has written into a new folder inside the run directory: `before-1`, `before-2`, ...

    Returns:
        The new folder; None if there was nothing to move.

    Raises:
        InputError: something cannot be moved.
    """
    found = [run_dir / name for name in _RECORDS if os.path.lexists(run_dir / name)]
    if not found:
        return None
    number = 1
    while os.path.lexists(run_dir / f"before-{number}"):
        number += 1
    target = run_dir / f"before-{number}"
    with _writing(run_dir):
        target.mkdir()
        for path in found:
            if path.name == FOLDER and path.is_symlink():
                _set_content_aside(path, target)
            else:
                path.rename(target / path.name)
    return target


def _set_content_aside(link: Path, target: Path) -> None:
    """Sets checkpoints aside when their folder is a link to another disk.

    They move to a new folder on that disk, and `target` gets a link to it. The old link stays, so the next checkpoints
    go to the same disk.
    """
    # The names of complete, unfinished and damaged checkpoints all begin with the step.
    steps = [path for path in link.iterdir() if path.name[0].isdecimal()]
    folder = link.resolve() / f"{target.parent.name}-{target.name}"
    folder.mkdir()
    for path in steps:
        path.rename(folder / path.name)
    (target / link.name).symlink_to(folder)


@contextlib.contextmanager
def _reading(run_dir: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read train.run_dir {run_dir} ({reason(error)}): choose another folder") from None


@contextlib.contextmanager
def _writing(run_dir: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write train.run_dir {run_dir} ({reason(error)}): make room there or choose another folder"
        ) from None


def _check_content(run_dir: Path) -> None:
    """Raises an InputError unless the path is missing, or a folder that holds a run or nothing of importance."""
    for path in (run_dir, run_dir / FOLDER):
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path} is a link to {path.readlink()}, which is not there: mount or make it, or remove the link"
            )
    if not run_dir.exists():
        return
    if run_dir.is_dir():
        known = _read_config(run_dir)
        if isinstance(known, ExperimentConfig) or read_record(run_dir) is not None or _stored_run(run_dir) is not None:
            return
        if known is not None:
            raise known
        if all(_is_harmless(path) or path.name == _CONFIG or _is_empty_place(path) for path in run_dir.iterdir()):
            return
    raise InputError(f"train.run_dir {run_dir} exists and holds no run: choose another folder")


def _is_harmless(path: Path) -> bool:
    return path.name in _HARMLESS or path.name.startswith(_HARMLESS_STARTS)


def _is_empty_place(path: Path) -> bool:
    """Whether the path is an empty folder for checkpoints, such as a link to another disk made before the run."""
    return path.name == FOLDER and path.is_dir() and all(_is_harmless(inner) for inner in path.iterdir())


def _check_config(config: ExperimentConfig, run_dir: Path) -> None:
    """Compares `config` with both configs that a run leaves: `config.json`, and the one in its newest checkpoint."""
    newest = newest_step(run_dir)
    if newest is None and not has_recorded_steps(run_dir):
        return
    stored = _stored_run(run_dir)
    for other in (_read_config(run_dir), stored and stored.config):
        if not isinstance(other, ExperimentConfig) or not (changes := result_changes(other, config)):
            continue
        if newest is not None and all(is_of_schedule(name) for name in changes):
            check_extension(other, config, run_dir, newest)
        else:
            raise InputError(
                f"{run_dir} holds a run with another config ({'; '.join(changes.values())}): choose another "
                "train.run_dir, or undo the change to resume it"
            )


def _read_config(run_dir: Path) -> ExperimentConfig | InputError | None:
    """Reads `config.json`: the config, or the error it gives; None if it is missing or empty (as a crash may leave it).

    The error is returned, not raised, because other files may still show that the folder holds a run.
    """
    path = run_dir / _CONFIG
    if not os.path.lexists(path) or (path.is_symlink() and not path.exists()):
        return None
    if not path.is_file():
        return InputError(f"{path} is not a file: remove it")
    text = path.read_text(errors="replace")
    if not text.strip("\0 \r\n\t"):
        return None
    try:
        return from_json(ExperimentConfig, text, origin=str(path))
    except InputError as error:
        return error


def _stored_run(run_dir: Path) -> StoredRun | None:
    return None if newest_step(run_dir) is None else stored_run(run_dir)
