"""A source in one file, registered by one line, is trained on, resumed, evaluated and stored like any other."""

import dataclasses
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba_jax import cli
from mamba_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    MeshConfig,
    from_json,
    to_json,
)
from mamba_jax.data.batches import Task
from mamba_jax.data.pipeline import evaluation_batches, open_source, train_batches
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from mamba_jax.evaluation.checkpoints import EvaluationRequest, evaluate_checkpoint
from mamba_jax.run.loop import train
from tests.runs import corpus, make_config
from tests.toys import source as toy
from tests.toys.source import CopySource

__all__ = ["corpus", "make_config"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_source.md"


@pytest.fixture
def make_copy_run(make_config: Callable[..., ExperimentConfig]) -> Callable[..., ExperimentConfig]:
    def make(**fields: object) -> ExperimentConfig:
        return make_config(**{"train": CopySource(), "num_steps": 4, **fields})

    return make


def opened(config: DataConfig) -> Task:
    task = open_source(config.train, "unused", ByteTokenizer())
    assert isinstance(task, Task)
    return task


def test_the_page_shows_this_source() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    source = inspect.getsource(toy)
    assert shown == source
    assert source.count("\n") < 60
    assert source.count("register") == 1


def test_batches_are_a_function_of_seed_and_step(make_copy_run: Callable[..., ExperimentConfig]) -> None:
    config = make_copy_run().data
    batches, task = train_batches(opened(config), config, seed=3), opened(config)
    ahead = batches.iterate(5)
    for step in (5, 6):
        np.testing.assert_array_equal(next(ahead).tokens, batches.at(step).tokens)
    assert not np.array_equal(batches.at(5).tokens, batches.at(6).tokens)
    assert not np.array_equal(batches.at(5).tokens, train_batches(task, config, seed=4).at(5).tokens)
    halves = [train_batches(task, config, seed=3, process_index=p, process_count=2).at(5) for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([half.targets for half in halves]), batches.at(5).targets)
    batch = batches.at(0)
    wanted = [row[row > 0][: toy.CopySource.length] for row in batch.tokens]
    np.testing.assert_array_equal(batch.targets[batch.loss_mask].reshape(len(wanted), -1), wanted)


def test_evaluation_has_batches_of_its_own(make_copy_run: Callable[..., ExperimentConfig]) -> None:
    config = make_copy_run().data
    found = list(evaluation_batches(opened(config), seq_len=24, documents="packed", batch_size=8, max_batches=3))
    assert len(found) == 3
    trained = [train_batches(opened(config), config, seed=0).at(step).tokens for step in range(5)]
    assert not any(np.array_equal(batch.tokens, tokens) for batch in found for tokens in trained)


def test_it_is_stored_and_changed_by_flags(make_copy_run: Callable[..., ExperimentConfig]) -> None:
    config = make_copy_run()
    assert from_json(ExperimentConfig, to_json(config), origin="test") == config
    changed = cli.parse(ExperimentConfig, ["--data.train.symbols", "9"], default=config)
    assert changed.data.train == CopySource(symbols=9)
    with pytest.raises(InputError, match="symbols must be at most 254, got 300"):
        cli.parse(ExperimentConfig, ["--data.train.symbols", "300"], default=config)
    with pytest.raises(InputError, match=r"unknown key .*lenght.*did you mean 'length'"):
        from_json(ExperimentConfig, to_json(config).replace('"length"', '"lenght"'), origin="test")


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_it_trains_and_resumes(make_copy_run: Callable[..., ExperimentConfig], devices: int) -> None:
    evaluation = EvaluationConfig(max_batches=2, batch_size=8)
    config = make_copy_run(
        validation=CopySource(),
        evaluation=evaluation,
        mesh=MeshConfig(data=devices),
        checkpoint=CheckpointConfig(every=2),
    )
    run_dir = Path(config.train.run_dir)
    whole = train(config, devices=jax.devices()[:devices])
    shutil.rmtree(run_dir / "checkpoints" / "4")
    resumed = train(config, devices=jax.devices()[:devices])
    assert (resumed.step, resumed.loss, resumed.validation) == (4, whole.loss, whole.validation)
    assert whole.validation is not None
    # At its last step a run reads all there is: 16 batches of a task.
    assert whole.validation.num_tokens == 16 * 8 * CopySource.length
    answers = evaluate_checkpoint(str(run_dir), EvaluationRequest(max_batches=2)).answers
    assert answers is not None
    assert (answers.num_answers, answers.num_rows) == (2 * 8 * CopySource.length, 2 * 8)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, train=CopySource(symbols=13)))
    with pytest.raises(InputError, match=r"data\.train"):
        train(other, devices=jax.devices()[:devices])


def test_streams_are_refused_in_one_line(make_copy_run: Callable[..., ExperimentConfig]) -> None:
    config = make_copy_run(order="streams")
    with pytest.raises(InputError, match=r"data\.order='streams'.*kind 'copy'.*set data\.order to 'shuffled'"):
        train(config, devices=jax.devices()[:1])
