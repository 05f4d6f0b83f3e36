"""A run, described whole."""

import dataclasses

from mamba_jax.config_base import Config, require
from mamba_jax.data.config import DataConfig
from mamba_jax.evaluation.config import EvaluationConfig
from mamba_jax.models.config import ModelConfig
from mamba_jax.sharding.config import MeshConfig
from mamba_jax.training.config import CheckpointConfig, FaultsConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Config):
    """Everything that decides a run's result.

    Attributes:
        name: a short name for logs and plots.
        seed: of parameters, data order and samples.
        model: the network.
        data: the text.
        optimizer: the update rule.
        train: the loop.
        mesh: the devices.
        checkpoint: saving.
        evaluation: held-out loss.
        faults: skipped steps and deadlines.
    """

    name: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    faults: FaultsConfig = FaultsConfig()

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences of an evaluation batch."""
        return self.evaluation.batch_size or self.data.global_batch

    def _check(self) -> None:
        require(0 <= self.seed < 2**32, f"ExperimentConfig.seed must lie in 0 .. 2**32 - 1, got {self.seed}")
        batch, parts = self.data.global_batch, self.train.accumulation_steps
        require(
            batch % parts == 0,
            f"data.global_batch ({batch}) must be divisible by train.accumulation_steps ({parts}): change one of them",
        )
        length, windows = self.data.seq_len, self.train.windows
        require(
            length % windows == 0,
            f"data.seq_len ({length}) must be divisible by train.windows ({windows}): change one of them",
        )
        self._check_recipe()

    def _check_recipe(self) -> None:
        """Weights and moments stay finite as long as gradients are.

        No element of a clipped gradient exceeds clip_norm, so neither does a mean of them, and Adam's direction is at
        most clip_norm / eps; Muon's is far smaller. Decay alone brings a weight nearer to 0.
        """
        recipe = self.optimizer
        largest_lr = max(recipe.peak_lr, recipe.schedule.final_lr)
        decay, way = largest_lr * recipe.weight_decay, self.train.num_steps * largest_lr * recipe.clip_norm / recipe.eps
        require(
            decay <= 1,
            f"optimizer.peak_lr * weight_decay = {decay:.3g} must not exceed 1: weights would change their sign",
        )
        require(
            way <= 1e37,
            f"train.num_steps * optimizer.peak_lr * clip_norm / eps = {way:.3g}: weights could exceed what float32 "
            "holds; lower peak_lr or clip_norm, or raise eps",
        )
