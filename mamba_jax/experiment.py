"""A run, described whole."""

import dataclasses

from mamba_jax.config_base import Config, require
from mamba_jax.data.config import DataConfig
from mamba_jax.evaluation.config import EvaluationConfig
from mamba_jax.models.config import ModelConfig
from mamba_jax.sharding.config import MeshConfig
from mamba_jax.training.config import CheckpointConfig, FaultsConfig, OptimizerConfig, ProgramConfig, TrainConfig


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
        _ = self.program  # checks that its parts go together

    @property
    def program(self) -> ProgramConfig:
        """What the compiled step depends on.

        Raises:
            InputError: its parts do not go together.
        """
        data, train = self.data, self.train
        return ProgramConfig(
            model=self.model,
            optimizer=self.optimizer,
            faults=self.faults,
            seed=self.seed,
            num_steps=train.num_steps,
            global_batch=data.global_batch,
            seq_len=data.seq_len,
            documents=data.documents,
            order=data.order,
            accumulation_steps=train.accumulation_steps,
            windows=train.windows,
            window_gradient=train.window_gradient,
            z_loss=train.z_loss,
            loss_chunk=train.loss_chunk,
        )
