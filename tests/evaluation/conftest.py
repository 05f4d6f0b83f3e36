"""A small model with random weights, and text to measure it on."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba_jax.checkpoint import Checkpointer
from mamba_jax.config import (
    DataConfig,
    ExperimentConfig,
    Mamba1Config,
    ModelConfig,
    OptimizerConfig,
    TextFolderSource,
    TrainConfig,
)
from mamba_jax.models.parameters import Params, define


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run directory that holds one checkpoint, and what is in it."""

    folder: Path
    config: ExperimentConfig
    params: Params

    @property
    def validation(self) -> TextFolderSource:
        """The text that the run is measured on."""
        source = self.config.data.validation
        assert isinstance(source, TextFolderSource)
        return source


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    folder = tmp_path_factory.mktemp("saved")
    rng = np.random.default_rng(0)
    for part, sizes in (("train", (90, 40)), ("validation", (53, 20, 70))):
        (folder / part).mkdir()
        for index, size in enumerate(sizes):
            (folder / part / f"{index}.txt").write_text("".join(rng.choice(list("aé \n"), size)))
    config = ExperimentConfig(
        name="test",
        model=ModelConfig(
            vocab_size=257,
            d_model=16,
            num_layers=2,
            mixer=Mamba1Config(state_dim=4),
            compute_dtype="float32",
            remat="none",
        ),
        data=DataConfig(
            train=TextFolderSource(path=str(folder / "train")),
            validation=TextFolderSource(path=str(folder / "validation")),
            seq_len=12,
            global_batch=8,
            documents="concatenated",
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        train=TrainConfig(num_steps=1, run_dir=str(folder / "run")),
    )
    params = jax.tree.map(
        lambda leaf: jax.numpy.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), define(config.model).params
    )
    checkpointer = Checkpointer(folder / "run", config.checkpoint)
    checkpointer.save(3, {"params": params, "rest": {"step": jax.numpy.int32(3)}}, config)
    checkpointer.close()
    return SavedRun(folder=folder / "run", config=config, params=params)
