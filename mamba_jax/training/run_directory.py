"""The folder of a run: who may write there, and whether a config may continue what is in it."""

import dataclasses
import uuid
from pathlib import Path

from flax.traverse_util import flatten_dict

from mamba_jax.checkpoint import check_path
from mamba_jax.config import ExperimentConfig, from_json, to_json
from mamba_jax.errors import InputError
from mamba_jax.training.replacement import replacement

_CONFIG = "config.json"

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


def check_run_directory(config: ExperimentConfig) -> None:
    """Makes sure that the run directory is free, or that the run in it is the one that `config` describes.

    Raises:
        InputError: it is no folder, cannot be read, or holds something else, or a run whose result would differ; the
            message names the fields.
    """
    if "://" in config.train.run_dir:
        raise InputError(
            f"train.run_dir {config.train.run_dir} is an address, but a folder is needed: mount the storage and name "
            "the folder (docs/running_on_a_pod.md)"
        )
    check_path(config.train.run_dir)
    try:
        _check_content(config, Path(config.train.run_dir))
    except OSError as error:
        raise InputError(
            f"cannot read train.run_dir {config.train.run_dir} ({error.strerror}): choose another folder"
        ) from None


def _check_content(config: ExperimentConfig, run_dir: Path) -> None:
    stored_path = run_dir / _CONFIG
    if stored_path.is_file():
        stored = from_json(ExperimentConfig, stored_path.read_text(errors="replace"), origin=str(stored_path))
        if changes := _result_changes(stored, config):
            raise InputError(
                f"{run_dir} holds a run with another config ({'; '.join(changes)}): choose another train.run_dir, "
                "or undo the change to resume it"
            )
    elif run_dir.exists() and (not run_dir.is_dir() or any(not _is_unfinished(path) for path in run_dir.iterdir())):
        raise InputError(f"train.run_dir {run_dir} exists and holds no run: choose another folder")


def claim_run_directory(config: ExperimentConfig) -> Path:
    """Creates the run directory if need be and stores the config there; later calls must agree with it.

    Call it when nothing can be wrong any more: a config with a mistake would keep its correction out.

    Raises:
        InputError: the folder cannot be created or written to; what it held stays as it was.
    """
    run_dir = Path(config.train.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # All processes of a run do this at the same time in the same folder.
        with replacement(run_dir / _CONFIG, mark=f".{uuid.uuid4().hex}") as temporary:
            temporary.write_text(to_json(config) + "\n")
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write train.run_dir {run_dir} ({_reason(error)}): make room there or choose another folder"
        ) from None
    return run_dir


def _reason(error: OSError | ValueError) -> str:
    """What a call of the system, or a text with a character that files cannot hold, says in one line."""
    return error.strerror if isinstance(error, OSError) and error.strerror else ascii(str(error))


def _is_unfinished(path: Path) -> bool:
    """Whether this is the stored config on its way, or what a killed process left of it."""
    return path.name.startswith(f".{_CONFIG}")


def _result_changes(stored: ExperimentConfig, current: ExperimentConfig) -> list[str]:
    old, new = (flatten_dict(dataclasses.asdict(config), sep=".") for config in (stored, current))
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _CHANGEABLE and not name.startswith(_CHANGEABLE_SECTIONS)
    ]
