"""The folder of a run: who may write there, and whether a config may continue what is in it."""

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from mamba_jax.checkpoint import FOLDER, StoredRun, check_path, newest_step, stored_run
from mamba_jax.config_base import from_json, to_json
from mamba_jax.errors import InputError, reason
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.files import replacement
from mamba_jax.run.distributed import from_first, raise_in_all
from mamba_jax.run.ownership import LOCK, OWNER
from mamba_jax.run.record import (
    RECORD,
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

# What a start leaves before it has done anything, and what file systems put into a folder.
_HARMLESS = {LOCK, OWNER, "lost+found", ".snapshot"}
_HARMLESS_STARTS = (f".{_CONFIG}", f".{RECORD}", f".{OWNER}", ".nfs")

# What a run writes; the last ones say that there is a run, so they are set aside last.
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

# Fields that may change when a run is resumed: they decide where, how fast and how visibly it runs, not its result.
_CHANGEABLE = {
    "name",
    "data.cache_dir",
    "data.prefetch",
    "faults.deadline_seconds",
    "faults.max_skipped",
    "faults.startup_seconds",
    "model.remat",
    "model.mixer.scan_implementation",
    "train.run_dir",
    "train.loss_chunk",
    "train.log_every",
    "train.profile_steps",
    "train.sample_every",
    "train.sample_prompt",
    "train.sample_tokens",
}
_CHANGEABLE_SECTIONS = ("mesh", "checkpoint", "evaluation", "data.validation")


def check_run_directory(config: ExperimentConfig, *, from_scratch: bool = False) -> None:
    """Makes sure that the run directory is free, or that the run in it is the one that `config` describes.

    Args:
        config: of the run.
        from_scratch: whatever run is in it will be set aside.

    Raises:
        InputError: it is not a folder, cannot be read, or holds something else, or a run whose result would differ; the
            message names the fields.
    """
    run_dir = Path(config.train.run_dir)
    check_is_run_or_free(config)
    with _reading(run_dir):
        if not from_scratch:
            _check_config(config, run_dir)


def check_is_run_or_free(config: ExperimentConfig) -> None:
    """Makes sure that a run may write to the run directory, whichever run it is.

    Raises:
        InputError: it is not a folder, cannot be read, or holds something else.
    """
    run_dir = config.train.run_dir
    if "://" in run_dir:
        raise InputError(
            f"train.run_dir {run_dir} is an address, but a folder is needed: mount the storage and name "
            "the folder (docs/running_on_a_pod.md)"
        )
    check_path(run_dir)
    with _writing(run_dir):
        # Some text that is not Unicode.
        to_json(config)
    with _reading(run_dir):
        _check_content(Path(run_dir))


def begins_at_zero(config: ExperimentConfig, *, from_scratch: bool) -> bool:
    """Checks the folder as its owner, and says whether a run begins there.

    Args:
        config: of the run.
        from_scratch: whatever run is in it will be set aside.

    Raises:
        InputError: as `check_run_directory`; or a run would begin again though it was saved.
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


def settle_run(config: ExperimentConfig, data: Mapping[str, Any], *, from_scratch: bool) -> RunRecord:
    """Says which run goes on or begins in a folder that `begins_at_zero` has passed; the first process decides.

    Args:
        config: of the run.
        data: what `data.train` resolves to.
        from_scratch: a new one begins, whatever is there.

    Returns:
        Its record; `saved` is None if it begins.

    Raises:
        InputError: the run was trained on other data.
    """
    run_dir = Path(config.train.run_dir)

    def settle() -> str:
        with _reading(run_dir):
            return to_text(RunRecord.new(data) if from_scratch else _find_run(run_dir, data))

    record = from_text(from_first(settle))
    raise_in_all(data_problem(run_dir, record.data, data))
    return record


def _find_run(run_dir: Path, data: Mapping[str, Any]) -> RunRecord:
    record, newest = read_record(run_dir), newest_step(run_dir)
    if newest is None and not has_recorded_steps(run_dir):
        return RunRecord.new(data)
    if record is None and (stored := _stored_run(run_dir)) is not None:
        record = from_identity(stored.identity)
    if record is None:
        record = RunRecord.new(data)
    saved = None if newest is None else max(newest, record.saved or 0)
    return dataclasses.replace(record, data=record.data or data, saved=saved)


def claim_run_directory(config: ExperimentConfig) -> Path:
    """Creates the run directory if need be and stores the config there; later calls must agree with it.

    Call it when nothing can be wrong any more.

    Raises:
        InputError: the folder cannot be created or written to; what it held stays as it was.
    """
    run_dir = Path(config.train.run_dir)
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        with replacement(run_dir / _CONFIG, mark=f".{uuid.uuid4().hex}") as temporary:
            temporary.write_text(to_json(config) + "\n")
    return run_dir


def store_record(run_dir: Path, record: RunRecord) -> None:
    """Stores which run it is.

    Raises:
        InputError: the folder cannot be written to; what it held stays as it was.
    """
    with _writing(run_dir):
        write_record(run_dir, record)


def set_aside(run_dir: Path) -> Path | None:
    """Moves all that a run has left to a new folder within, `before-1` for the first; returns it, or None.

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
    """Checkpoints behind a link stay on their disk, and so will the next ones."""
    # Whole ones, damaged ones, and what is left of others.
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
    """Whether this is where checkpoints will be, such as a link to another disk."""
    return path.name == FOLDER and path.is_dir() and all(_is_harmless(inner) for inner in path.iterdir())


def _check_config(config: ExperimentConfig, run_dir: Path) -> None:
    """Compares the config with those of the run: the stored one, and that of its newest checkpoint."""
    if newest_step(run_dir) is None and not has_recorded_steps(run_dir):
        return
    stored = _stored_run(run_dir)
    for other in (_read_config(run_dir), stored and stored.config):
        if isinstance(other, ExperimentConfig) and (changes := _result_changes(other, config)):
            raise InputError(
                f"{run_dir} holds a run with another config ({'; '.join(changes)}): choose another train.run_dir, "
                "or undo the change to resume it"
            )


def _read_config(run_dir: Path) -> ExperimentConfig | InputError | None:
    """The stored config, what is wrong with it, or None if it is missing or empty, as after a crash of the machine."""
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


def _result_changes(stored: ExperimentConfig, current: ExperimentConfig) -> list[str]:
    old, new = (flatten_dict(dataclasses.asdict(config), sep=".") for config in (stored, current))
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _CHANGEABLE and not name.startswith(_CHANGEABLE_SECTIONS)
    ]
