"""What a run begins with: weights of another one, or its whole state, from which it goes on bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mamba_jax.checkpoint import StoredRun, load_params
from mamba_jax.config import (
    CheckpointConfig,
    CosineSchedule,
    EvaluationConfig,
    ExperimentConfig,
    TextFolderSource,
    WarmupStableDecaySchedule,
)
from mamba_jax.errors import InputError
from mamba_jax.export.initial import initial_weights, model_of
from mamba_jax.report.page import render
from mamba_jax.report.run import read_run
from mamba_jax.run import loop
from mamba_jax.run.hooks import Hooks
from mamba_jax.run.loop import TrainResult
from mamba_jax.run.record import Lineage
from mamba_jax.run.start import Start
from mamba_jax.telemetry.events import read_events
from mamba_jax.telemetry.metrics import read_metrics
from mamba_jax.training.train_state import TrainState
from tests.runs import Die

MakeConfig = Callable[..., ExperimentConfig]

pytestmark = pytest.mark.usefixtures("shared_step")

PLATEAU = WarmupStableDecaySchedule(warmup_steps=2, decay_steps=0)
DECAY = WarmupStableDecaySchedule(warmup_steps=2, decay_steps=2)


def train(config: ExperimentConfig, **options: Any) -> TrainResult:
    return loop.train(config, devices=jax.devices()[:1], **options)


def changed(config: ExperimentConfig, **fields: Any) -> ExperimentConfig:
    """The config with other fields of `train`; `schedule` is the optimizer's."""
    if "schedule" in fields:
        optimizer = dataclasses.replace(config.optimizer, schedule=fields.pop("schedule"))
        config = dataclasses.replace(config, optimizer=optimizer)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def exact(config: ExperimentConfig, kind: str = "train", name: str = "loss") -> dict[int, str]:
    found = [record for record in read_metrics(Path(config.train.run_dir)) if record["kind"] == kind]
    by_step = {record["step"]: float(record[name]).hex() for record in found}
    assert len(by_step) == len(found)
    return by_step


def refusal(config: ExperimentConfig) -> str:
    with pytest.raises(InputError) as error:
        train(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def trunk(make_config: MakeConfig, corpus: Path) -> ExperimentConfig:
    """Six steps, of which 2, 4 and 6 are kept, with a learning rate that stays at its peak from the second on."""
    config = make_config(
        seed=5,
        schedule=PLATEAU,
        num_steps=6,
        validation=TextFolderSource(path=str(corpus / "validation")),
        checkpoint=CheckpointConfig(every=2, keep=5),
        evaluation=EvaluationConfig(every=4, max_batches=1),
    )
    assert train(config).is_complete
    return config


@pytest.fixture(scope="module")
def whole(trunk: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """Eight steps with a decay at the end, made in one go."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    config = changed(trunk, run_dir=str(run_dir), num_steps=8, schedule=DECAY)
    assert train(config).is_complete
    return config


@pytest.fixture
def place(tmp_path: Path, trunk: ExperimentConfig) -> Callable[..., ExperimentConfig]:
    """Makes the trunk's config with some fields changed, in a new run directory."""

    def make(name: str = "run", **fields: Any) -> ExperimentConfig:
        return changed(trunk, run_dir=str(tmp_path / name), **fields)

    return make


class Observe(Hooks):
    """Keeps the state that a run begins with, and perhaps ends it there."""

    state: TrainState

    def __init__(self, *, stop: bool = False) -> None:
        self._stop = stop

    def on_start(self, step: int, state: TrainState) -> None:
        self.state = jax.device_get(state)
        if self._stop:
            raise ZeroDivisionError


def lineage(config: ExperimentConfig) -> dict[str, Any]:
    return json.loads((Path(config.train.run_dir) / "run.json").read_text())["lineage"]


def test_branches_have_the_losses_of_their_trunk(
    trunk: ExperimentConfig, whole: ExperimentConfig, place: Callable[..., ExperimentConfig]
) -> None:
    """With the same schedule all of them, killed and started again; with a decay those before it, and then its own."""
    source = f"{trunk.train.run_dir}@2"
    same = place("same", branch_from=source)
    decayed = place("decayed", branch_from=source, num_steps=8, schedule=DECAY)
    with pytest.raises(ZeroDivisionError):
        train(same, hooks=Die(ZeroDivisionError(), after=3))
    assert train(same).is_complete
    assert train(decayed).is_complete
    expected = exact(trunk)
    assert exact(same) == {step: expected[step] for step in (3, 4, 5, 6)}
    assert {step: exact(decayed)[step] for step in (3, 4, 5, 6)} == exact(same)
    assert exact(decayed) == {step: exact(whole)[step] for step in range(3, 9)}
    params = [load_params(config.train.run_dir).params for config in (trunk, same)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    # Held-out loss where it begins, and where the trunk has one.
    held_out = exact(same, "validation")
    assert list(held_out) == [2, 4, 6]
    assert held_out[4] == exact(trunk, "validation")[4]

    run = json.loads((Path(trunk.train.run_dir) / "run.json").read_text())["run"]
    origin = {"kind": "branch", "path": trunk.train.run_dir, "step": 2, "run": run}
    assert lineage(same) == {**origin, "changes": []}
    assert lineage(decayed) == {
        **origin,
        "changes": ["optimizer.schedule.decay_steps was 0, now 2", "train.num_steps was 6, now 8"],
    }
    page = render([read_run(Path(decayed.train.run_dir))])
    assert f"a branch of {trunk.train.run_dir} at step 2" in page
    assert "optimizer.schedule.decay_steps was 0, now 2" in page


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"branch_from": "{trunk}@3"}, ["has no checkpoint of step 3; there are 2, 4, 6"]),
        ({"branch_from": "{trunk}"}, ["names no step: give RUN@STEP; {trunk} has kept 2, 4, 6"]),
        (
            {"branch_from": "{trunk}@2", "run_dir": "{trunk}"},
            ["holds a run with another config", "train.branch_from was"],
        ),
        ({"branch_from": "nowhere@2"}, ["nowhere is not a run directory"]),
        ({"branch_from": "{trunk}@6"}, ["train.num_steps is 6, and 6 steps are done: raise it"]),
        ({"branch_from": "{trunk}@2", "num_layers": 3}, ["model.num_layers was 2, here 3"]),
        ({"branch_from": "{trunk}@2", "seed": 1, "seq_len": 12}, ["seed was 5, now 1", "data.seq_len was 24, now 12"]),
        ({"branch_from": "{trunk}@2", "ema_decay": 0.9}, ["optimizer.ema_decay was None, now 0.9"]),
        ({"branch_from": "{trunk}@2", "algorithm": "muon"}, ["optimizer.algorithm was 'adamw', now 'muon'"]),
        ({"branch_from": "{trunk}@2", "peak_lr": 0.5}, ["step 1, which is done, was 0.005 and would be 0.25"]),
        (
            {"branch_from": "{trunk}@4", "schedule": WarmupStableDecaySchedule(warmup_steps=2, decay_steps=4)},
            ["the learning rate of step 3, which is done", "train.branch_from={trunk}@2"],
        ),
        (
            {"branch_from": "{trunk}@2", "schedule": WarmupStableDecaySchedule(warmup_fraction=0.5)},
            ["optimizer.schedule.warmup_steps=2 keeps its warm-up"],
        ),
        ({"init_from": "{trunk}@5"}, ["has no checkpoint of step 5; there are 2, 4, 6"]),
        ({"init_from": "{trunk}", "init_weights": "average"}, ["keeps no average of the weights"]),
        (
            {"init_from": "{trunk}", "init_optimizer": True, "algorithm": "muon"},
            ["{trunk} has moments of another kind (optimizer.algorithm was 'adamw', now 'muon')"],
        ),
        ({"init_from": "{trunk}", "d_model": 32}, ["holds another model, 2 layers of width 16: model.d_model was 16"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(
    make_config: MakeConfig, trunk: ExperimentConfig, fields: dict[str, Any], messages: list[str]
) -> None:
    run_dir = trunk.train.run_dir

    def filled(value: Any) -> Any:
        return value.replace("{trunk}", run_dir) if isinstance(value, str) else value

    train_fields = {"num_steps": 6, "schedule": PLATEAU, "seed": 5} | {name: filled(v) for name, v in fields.items()}
    message = refusal(make_config(**train_fields))
    for part in messages:
        assert filled(part) in message


def test_weights_of_a_run_are_measured_before_the_first_step(
    trunk: ExperimentConfig, place: Callable[..., ExperimentConfig]
) -> None:
    config = place(init_from=f"{trunk.train.run_dir}@4")
    weights = initial_weights(config)
    assert weights is not None
    # One process cannot send arrays that lie on its devices to those of another.
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights.params))
    observer = Observe()
    assert train(config, hooks=observer).is_complete
    assert int(observer.state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, observer.state.params, load_params(trunk.train.run_dir, 4).params)
    held_out = exact(config, "validation")
    assert list(held_out) == [0, 4, 6]
    assert held_out[0] == exact(trunk, "validation")[4]
    assert lineage(config)["step"] == 4
    assert model_of(f"{trunk.train.run_dir}@4") == model_of(trunk.train.run_dir) == trunk.model
    assert list(exact(config)) == [1, 2, 3, 4, 5, 6]


def test_moments_come_with_the_weights(trunk: ExperimentConfig, place: Callable[..., ExperimentConfig]) -> None:
    """All of the optimizer but the place in the schedule."""
    source = f"{trunk.train.run_dir}@4"
    with_moments, branch = Observe(stop=True), Observe(stop=True)
    with pytest.raises(ZeroDivisionError):
        train(place("moments", init_from=source, init_optimizer=True), hooks=with_moments)
    with pytest.raises(ZeroDivisionError):
        train(place("branch", branch_from=source), hooks=branch)
    assert (int(with_moments.state.step), int(branch.state.step)) == (0, 4)
    jax.tree.map(np.testing.assert_array_equal, with_moments.state.params, branch.state.params)
    rates = [
        optax.tree_utils.tree_get_all_with_path(state.state.opt_state, "count") for state in (with_moments, branch)
    ]
    assert [[int(count) for _, count in found] for found in rates] == [[4, 0], [4, 4]]
    moments = [optax.tree_utils.tree_get(state.state.opt_state, "mu") for state in (with_moments, branch)]
    jax.tree.map(np.testing.assert_array_equal, *moments)


def test_a_finished_run_is_extended_exactly(
    trunk: ExperimentConfig, whole: ExperimentConfig, place: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    """Where the past would be the same, it goes on in its folder as if it had been that long from the start."""
    shutil.copytree(trunk.train.run_dir, tmp_path / "run")
    longer = place(num_steps=8, schedule=DECAY)
    assert train(longer).step == 8
    assert exact(longer) == exact(whole)
    # The evaluation that ended the shorter run stays what it was.
    assert exact(longer, "validation") == exact(trunk, "validation") | exact(whole, "validation")
    (event,) = (event for event in read_events(tmp_path / "run") if event["event"] == "extended")
    assert event["step"] == 6
    assert "train.num_steps was 6, now 8" in event["changes"]
    assert "train.num_steps was 6, now 8" in render([read_run(tmp_path / "run")])

    # It has decayed by now.
    message = refusal(place(num_steps=10, schedule=DECAY))
    assert "the learning rate of step 7, which is done, was 0.005 and would be 0.01" in message
    assert f"train.branch_from={tmp_path / 'run'}@6" in message
    assert "past train.num_steps" in refusal(place(num_steps=6, schedule=PLATEAU))
    cosine = place(num_steps=10, schedule=CosineSchedule(warmup_steps=2))
    assert f"train.branch_from={tmp_path / 'run'}@2" in refusal(cosine)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    assert "up to step 2 is kept to branch from; a new run can begin with its weights, train.init_from=" in refusal(
        cosine
    )
    assert "seed was 5, now 6" in refusal(dataclasses.replace(longer, seed=6))


def test_a_damaged_step_stays_where_it_is(
    trunk: ExperimentConfig, place: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    shutil.copytree(trunk.train.run_dir, tmp_path / "trunk")
    step = tmp_path / "trunk" / "checkpoints" / "4"
    for path in step.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-5])
    message = refusal(place(branch_from=f"{tmp_path / 'trunk'}@4"))
    assert f"checkpoint {step} is damaged" in message
    assert message.endswith(f"take another step of {tmp_path / 'trunk'}")
    assert step.is_dir()


def test_other_text_is_taken_under_another_name_only(trunk: ExperimentConfig) -> None:
    stored = StoredRun(config=trunk, identity={"data": {"tokens": 1}}, step=2)
    start = Start(lineage=Lineage(kind="branch", path="trunk", step=2), trunk=stored)
    with pytest.raises(InputError, match=r"not what trunk was trained on \(tokens was 1, now 2\)"):
        start.check_data(trunk, {"tokens": 2})
    start.check_data(trunk, {"tokens": 1})
    other = dataclasses.replace(trunk.data, train=TextFolderSource(path="other"))
    start.check_data(dataclasses.replace(trunk, data=other), {"tokens": 2})
    streams = dataclasses.replace(trunk, data=dataclasses.replace(other, order="streams"))
    with pytest.raises(InputError, match="put that back"):
        start.check_data(streams, {"tokens": 2})
