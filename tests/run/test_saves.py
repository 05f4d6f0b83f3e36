"""When a run saves: before whatever else is due, not while steps are skipped, and at its end or not without a word."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import pytest

from mamba_jax.checkpoint import Checkpointer, SaveFailed, load_params
from mamba_jax.config import CheckpointConfig, EvaluationConfig, ExperimentConfig, TextFolderSource
from mamba_jax.errors import InputError
from mamba_jax.run import loop
from mamba_jax.run.hooks import Hooks
from mamba_jax.run.loop import TrainResult
from mamba_jax.telemetry.events import read_events
from mamba_jax.telemetry.metrics import StatusDisplay, read_metrics, read_samples
from mamba_jax.training.train_state import TrainState
from tests.runs import Spoil

MakeConfig = Callable[..., ExperimentConfig]

pytestmark = pytest.mark.usefixtures("shared_step")


def train(config: ExperimentConfig, hooks: Hooks | None = None) -> TrainResult:
    return loop.train(config, devices=jax.devices()[:1], hooks=hooks)


def saved_steps(config: ExperimentConfig) -> list[int]:
    return sorted(int(path.name) for path in (Path(config.train.run_dir) / "checkpoints").iterdir())


@pytest.fixture
def config(make_config: MakeConfig, corpus: Path) -> ExperimentConfig:
    """Six steps; at each second one it saves, evaluates and writes a sample."""
    return make_config(
        num_steps=6,
        checkpoint=CheckpointConfig(every=2, keep=9),
        evaluation=EvaluationConfig(every=2, max_batches=1),
        validation=TextFolderSource(path=str(corpus / "validation")),
        sample_every=2,
        sample_tokens=4,
    )


def test_sample_that_fails_costs_a_sample(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(StatusDisplay, "note", lambda self, text: notes.append(text))

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "in two\nlines")

    monkeypatch.setattr(loop, "complete", fail)
    assert train(config).is_complete
    assert saved_steps(config) == [2, 4, 6]
    told = [note for note in notes if note.startswith("no sample of step ")]
    assert [note.split()[4] for note in told] == ["2:", "4:", "6:"]
    assert all("UnicodeDecodeError" in note and "\n" not in note for note in told)


class DamagedText(Hooks):
    """Fails as an evaluation does that reads damaged text."""

    def __init__(self, at: int) -> None:
        self._at = at

    def before_evaluation(self, step: int) -> None:
        if step == self._at:
            raise InputError("damaged text")


class FlipBit(Hooks):
    """Puts a value into the largest array of the state, once step `after` is written."""

    def __init__(self, value: float, after: int) -> None:
        self._value, self._after = value, after

    def after_step(self, step: int, values: Mapping[str, float], state: TrainState) -> TrainState:
        if step != self._after:
            return state
        leaves, tree = jax.tree.flatten(state)
        place = max(range(len(leaves)), key=lambda i: leaves[i].size if leaves[i].dtype == "float32" else 0)
        leaves[place] = leaves[place].at[0, 0].set(self._value)
        return jax.tree.unflatten(tree, leaves)


def test_save_comes_before_what_else_is_due(config: ExperimentConfig) -> None:
    """A start that ends in an evaluation has saved; the next one makes the records of that step, once."""
    for last in (2, 4, 6):
        with pytest.raises(InputError, match="damaged text"):
            train(config, DamagedText(at=last))
        assert saved_steps(config)[-1] == last
    assert train(config).is_complete
    records = read_metrics(Path(config.train.run_dir))
    for kind, steps in (("train", [1, 2, 3, 4, 5, 6]), ("validation", [2, 4, 6])):
        assert [record["step"] for record in records if record["kind"] == kind] == steps
    assert [step for step, _ in read_samples(Path(config.train.run_dir))] == [2, 4, 6]


def test_nothing_is_saved_while_steps_are_skipped(config: ExperimentConfig) -> None:
    assert train(config, Spoil({4, 6})).is_complete
    # Skipped as well, but the last: its weights are those of step 5.
    assert saved_steps(config) == [2, 6]
    events = read_events(Path(config.train.run_dir))
    assert [event["step"] for event in events if event["event"] == "save_left_out"] == [4]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2, 6]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_state_that_is_not_finite_is_not_saved(config: ExperimentConfig, value: float) -> None:
    """A flipped bit that no loss shows: the checkpoint before it is kept, and the run ends with a line."""
    with pytest.raises(InputError, match=r"step 6 could not be saved: the array \S+ holds values that are not finite"):
        train(config, FlipBit(value, after=3))
    assert saved_steps(config) == [2]
    failed = [event for event in read_events(Path(config.train.run_dir)) if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [4, 6]


def test_last_save_that_fails_is_not_the_end_of_the_run(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpointer.save

    def fail_at_last(self: Checkpointer, step: int, *args: Any) -> None:
        if step == 6:
            raise SaveFailed("OSError: no room")
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", fail_at_last)
        with pytest.raises(
            InputError, match="step 6 could not be saved: OSError: no room; remove the cause and run the same"
        ):
            train(config)
    assert "finished" not in {event["event"] for event in read_events(Path(config.train.run_dir))}
    assert train(config).is_complete
    assert load_params(config.train.run_dir).step == 6
