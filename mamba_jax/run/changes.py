"""What differs between two configs, and whether a run that has done some steps may go on with the second one."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mamba_jax.checkpoint import FOLDER, steps_in
from mamba_jax.config_base import nested_fields
from mamba_jax.errors import InputError, short
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.training.optimizer import learning_rate

# Fields that may change when a run is resumed: they decide where, how fast and how visibly it runs, not its result. The
# backends of mixers are among them.
_CHANGEABLE = {
    "name",
    "data.cache_dir",
    "data.prefetch",
    "faults.deadline_seconds",
    "faults.max_skipped",
    "faults.startup_seconds",
    "model.remat",
    "model.unroll",
    "train.run_dir",
    "train.loss_chunk",
    "train.log_every",
    "train.profile_steps",
    "train.sample_every",
    "train.sample_prompt",
    "train.sample_tokens",
}
_CHANGEABLE_SECTIONS = ("mesh", "checkpoint", "evaluation", "data.validation")


def result_changes(stored: ExperimentConfig, current: ExperimentConfig) -> dict[str, str]:
    """What differs between two configs and changes the result: a phrase for each field, by its dotted name."""
    old, new = (dict(nested_fields(dataclasses.asdict(config))) for config in (stored, current))
    return {
        name: f"{name} was {short(old.get(name))}, now {short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _may_change(name)
    }


def is_of_schedule(name: str) -> bool:
    """Whether a field may change in the midst of a run, as long as no learning rate of the past depends on it."""
    return name == "train.num_steps" or name.startswith("optimizer.schedule.")


def check_extension(stored: ExperimentConfig, current: ExperimentConfig, run_dir: Path, done: int) -> None:
    """Makes sure that a run may go on with another schedule: every update done had the learning rate of both.

    Args:
        stored: the config that the run was trained with.
        current: the one to go on with, which differs in fields of the schedule only.
        run_dir: the run's folder.
        done: updates done.

    Raises:
        InputError: a learning rate of the past is another one, or the run is past its end; the message says from which
            kept step another run may branch.
    """
    changes = "; ".join(result_changes(stored, current).values())
    if current.train.num_steps < done:
        raise InputError(
            f"{run_dir} is at step {done}, past train.num_steps ({changes}): undo the change, or branch from an "
            "earlier step into another train.run_dir"
        )
    if problem := past_problem(stored, current, run_dir, done):
        raise InputError(f"{run_dir} cannot go on with another schedule ({changes}): {problem}")


def past_problem(stored: ExperimentConfig, current: ExperimentConfig, trunk: Path, done: int) -> str:
    """Says which learning rate of the steps done would have been another one, and what to do; empty if none.

    Args:
        stored: the config of the steps done.
        current: the config to go on with.
        trunk: folder of the run that did them.
        done: updates done.
    """
    was, now = (
        np.asarray(learning_rate(config.optimizer, config.train.num_steps)(jnp.arange(done)))
        for config in (stored, current)
    )
    differing = np.flatnonzero(was != now)
    if not differing.size:
        return ""
    same = int(differing[0])
    warmups = [config.optimizer.schedule.warmup(config.train.num_steps) for config in (stored, current)]
    if warmups[0] != warmups[1]:
        advice = f"optimizer.schedule.warmup_steps={warmups[0]} keeps its warm-up"
    elif kept := [step for step in steps_in(trunk / FOLDER) if step <= same]:
        advice = f"branch from an earlier step into another train.run_dir, train.branch_from={trunk}@{kept[-1]}"
    else:
        advice = (
            f"no checkpoint up to step {same} is kept to branch from; a new run can begin with its weights, "
            f"train.init_from={trunk}"
        )
    return (
        f"the learning rate of step {same + 1}, which is done, was {was[same]:.6g} and would be {now[same]:.6g}; "
        f"{advice}"
    )


def _may_change(name: str) -> bool:
    is_backend = name.startswith("model.mixer.") and name.endswith("_implementation")
    return is_backend or name in _CHANGEABLE or name.startswith(_CHANGEABLE_SECTIONS)
