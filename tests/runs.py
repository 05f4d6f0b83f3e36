"""A run small enough to train in a test."""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_jax.config import (
    DataConfig,
    ExperimentConfig,
    Mamba1Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TrainConfig,
)
from mamba_jax.data.batch import LMBatch
from mamba_jax.run.hooks import Hooks
from mamba_jax.training import program
from mamba_jax.training.config import ProgramConfig
from mamba_jax.training.train_state import TrainState

WORDS = ("state", "space", "models", "select", "what", "they", "remember", "and", "forget", "the", "rest")

MakeConfig = Callable[..., ExperimentConfig]


class Signal(Hooks):
    """Raises a signal when step `at` is running, the step before it being written."""

    def __init__(self, number: int, at: int) -> None:
        self._number, self._at = number, at

    def after_step(self, step: int, values: Mapping[str, float], state: TrainState) -> TrainState:
        if step == self._at - 1:
            signal.raise_signal(self._number)
        return state


class Die(Hooks):
    """Raises an exception once a step is written."""

    def __init__(self, error: BaseException, after: int) -> None:
        self._error, self._after = error, after

    def after_step(self, step: int, values: Mapping[str, float], state: TrainState) -> TrainState:
        if step == self._after:
            raise self._error
        return state


class Spoil(Hooks):
    """Gives some steps token ids outside the vocabulary, whose embedding is not a number."""

    def __init__(self, steps: set[int]) -> None:
        self._steps = steps

    def before_step(self, step: int, batch: LMBatch) -> LMBatch:
        if step not in self._steps:
            return batch
        return dataclasses.replace(batch, tokens=np.full_like(batch.tokens, 10_000))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "train" and "validation" of short documents of random words."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for part, documents in (("train", 12), ("validation", 3)):
        (folder / part).mkdir()
        for index in range(documents):
            text = " ".join(rng.choice(WORDS, size=40))
            (folder / part / f"{index}.txt").write_text(text + ".\n")
    return folder


@pytest.fixture(scope="session")
def make_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """Twelve steps on one device in a new run directory; a field such as `num_steps` overrides that of its section."""

    def make(**fields: Any) -> ExperimentConfig:
        def section(cls, **defaults):
            names = cls.__dataclass_fields__.keys()
            return cls(**{**defaults, **{name: fields.pop(name) for name in list(fields) if name in names}})

        sections = {name: fields.pop(name) for name in ("seed", "checkpoint", "evaluation", "lora") if name in fields}
        config = ExperimentConfig(
            name="test",
            model=section(
                ModelConfig,
                vocab_size=257,
                d_model=16,
                num_layers=2,
                mixer=Mamba1Config(state_dim=4, dt_rank=2),
                compute_dtype="float32",
                remat="none",
            ),
            optimizer=section(OptimizerConfig, peak_lr=1e-2),
            train=section(
                TrainConfig,
                num_steps=12,
                run_dir=str(tmp_path_factory.mktemp("runs") / "run"),
                log_every=1,
                loss_chunk=10,
            ),
            mesh=fields.pop("mesh", MeshConfig(data=1)),
            data=section(
                DataConfig,
                train=TextFolderSource(path=str(corpus / "train")),
                seq_len=24,
                global_batch=8,
                cache_dir=str(corpus / "cache"),
            ),
            **sections,
        )
        assert not fields, f"no config has {sorted(fields)}"
        return config

    return make


@pytest.fixture(scope="module")
def shared_step() -> Iterator[None]:
    """Starts of the same model trace its step once; here it is not what is tested."""
    make, made = program.make_train_step, {}

    def make_once(config: ProgramConfig, *rest: Any) -> Any:
        key = (config.model, config.optimizer, config.lora, config.num_steps)
        if key not in made:
            made[key] = make(config, *rest)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_train_step", make_once)
        yield
