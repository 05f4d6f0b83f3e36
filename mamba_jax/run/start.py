"""What a run that begins starts from: random weights, those of something else, or the whole state of another run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamba_jax.checkpoint import FOLDER, StoredRun, load_state, steps_in, stored_step
from mamba_jax.errors import InputError
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.export.companions import tokenizer_of_run
from mamba_jax.export.initial import initial_weights, model_differences, split_step, tokenizer_differences
from mamba_jax.models.parameters import Params
from mamba_jax.run.changes import past_problem, result_changes
from mamba_jax.run.distributed import raise_in_all
from mamba_jax.run.record import Lineage, data_changes
from mamba_jax.training.optimizer import begin_schedule
from mamba_jax.training.program import TrainProgram
from mamba_jax.training.train_state import TrainState

# Fields that a branch shares with its trunk, beside the model and the tokenizer: they decide which text the steps
# before it have read, and what the state holds.
_SHARED = (
    "seed",
    "data.order",
    "data.seq_len",
    "data.global_batch",
    "faults.spike_window",
    "lora.",
    "optimizer.algorithm",
    "optimizer.lr_multipliers",
)
# Those that decide which moments there are, and which arrays lie beside them.
_BESIDE_MOMENTS = ("data.order", "faults.spike_window", "lora.", "optimizer.algorithm", "optimizer.lr_multipliers")
# Enough for anybody; a record has to pass from process to process.
_MOST_CHANGES = 60
_SOURCES = {"train.init_from", "train.init_weights", "train.init_optimizer", "train.branch_from"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a run that begins starts from.

    Attributes:
        lineage: where that comes from; None for random weights.
        params: the weights; None if they are random, or part of a state.
        trunk: the run whose state it is, at the step in `lineage`; None without a branch.
    """

    lineage: Lineage | None = None
    params: Params | None = None
    trunk: StoredRun | None = None

    @property
    def step(self) -> int:
        """Updates done."""
        return 0 if self.lineage is None else self.lineage.first_step

    def state(self, program: TrainProgram) -> TrainState:
        """The state before the first step of this run.

        Raises:
            InputError: the state of another run is damaged, cannot be read now, or has other arrays.
        """
        origin, items = self.lineage, program.state.items()
        if origin is None or origin.step is None:
            return program.initialize(self.params)
        if origin.kind == "branch":
            return TrainState.from_items(load_state(origin.path, origin.step, items))
        fresh = program.initialize(self.params)
        if origin.kind != "moments":
            return fresh
        stored = load_state(origin.path, origin.step, {"rest": items["rest"]})["rest"]["opt_state"]
        return dataclasses.replace(fresh, opt_state=begin_schedule(stored, fresh.opt_state))

    def check_data(self, config: ExperimentConfig, data: Mapping[str, Any]) -> None:
        """Makes sure that a branch goes on in its trunk's text, or in one that the config names as another.

        Args:
            config: config of the branch.
            data: identity of its training data, see `TokenDataset.identity`.

        Raises:
            InputError: the text under the same name has changed, or rows of streams would go on in another text.
        """
        problem = ""
        if self.trunk is not None and self.lineage is not None:
            recorded = (self.trunk.identity or {}).get("data") or {}
            is_same = config.data.order == "streams" or config.data.train == self.trunk.config.data.train
            if is_same and (changes := data_changes(recorded, data)):
                problem = (
                    f"train.branch_from: data.train is not what {self.lineage.path} was trained on "
                    f"({'; '.join(changes)}): put that back, or take its weights alone with train.init_from"
                )
        raise_in_all(problem)


def find_start(config: ExperimentConfig) -> Start:
    """What `train.init_from` or `train.branch_from` names; random weights if neither is given.

    Raises:
        InputError: it does not exist, is damaged, or does not fit the config; one line says what differs.
    """
    if config.train.branch_from is not None:
        return _find_trunk(config, config.train.branch_from)
    weights = initial_weights(config)
    if weights is None:
        return Start()
    folder, _ = split_step(str(config.train.init_from))
    changes = {} if weights.experiment is None else result_changes(weights.experiment, config)
    kind = "moments" if config.train.init_optimizer else config.train.init_weights
    if kind == "moments" and (others := _beginning(changes, _BESIDE_MOMENTS)):
        raise InputError(f"train.init_optimizer: {folder} has moments of another kind ({'; '.join(others)}): undo that")
    phrases = _phrases(changes)
    if weights.added:
        if kind == "moments":
            raise InputError(
                f"train.init_optimizer: {folder} has no moments for the {weights.added} tokens that data.tokenizer "
                "adds: leave it out"
            )
        phrases = (f"{weights.added} tokens were added, whose rows are the mean of the others", *phrases)
    return Start(
        lineage=Lineage(kind=kind, path=str(folder), step=weights.step, run=weights.run, changes=phrases),
        params=weights.params,
    )


def _find_trunk(config: ExperimentConfig, source: str) -> Start:
    """The step of another run that `train.branch_from` names, once all that a branch shares with it agrees."""
    folder, step = split_step(source)
    if step is None:
        kept = ", ".join(map(str, steps_in(folder / FOLDER))) or "no step"
        raise InputError(f"train.branch_from {source} names no step: give RUN@STEP; {folder} has kept {kept}")
    if folder.resolve() == Path(config.train.run_dir).resolve():
        raise InputError(f"train.branch_from {source} is train.run_dir itself: choose another train.run_dir")
    trunk = stored_step(folder, step)
    if problem := _branch_problem(trunk, config, folder):
        raise InputError(f"train.branch_from {source} does not go on with this config: {problem}")
    run = (trunk.identity or {}).get("run")
    changes = _phrases(result_changes(trunk.config, config))
    return Start(lineage=Lineage(kind="branch", path=str(folder), step=step, run=run, changes=changes), trunk=trunk)


def _branch_problem(trunk: StoredRun, config: ExperimentConfig, folder: Path) -> str:
    """Why a state of the trunk cannot go on with a config, and what to do; empty if it can."""
    changes = result_changes(trunk.config, config)
    differences = model_differences(trunk.config.model, config.model)
    tokenizer = tokenizer_of_run(folder, trunk.config.data.tokenizer)
    differences += tokenizer_differences(tokenizer, config.data.tokenizer)
    differences += _beginning(changes, _SHARED)
    if config.optimizer.ema_decay is not None and trunk.config.optimizer.ema_decay is None:
        differences.append(changes["optimizer.ema_decay"])
    if differences:
        return f"{'; '.join(differences)}; undo that, or take the weights alone with train.init_from"
    if config.train.num_steps <= trunk.step:
        return f"train.num_steps is {config.train.num_steps}, and {trunk.step} steps are done: raise it"
    return past_problem(trunk.config, config, folder, trunk.step)


def _beginning(changes: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    """The phrases for fields whose names begin with one of these."""
    return [phrase for name, phrase in changes.items() if name.startswith(names)]


def _phrases(changes: Mapping[str, str]) -> tuple[str, ...]:
    """A phrase for each field that differs, of which those that name the source itself are left out."""
    return tuple(phrase for name, phrase in changes.items() if name not in _SOURCES)[:_MOST_CHANGES]
