"""The config of a whole experiment: model, data, optimizer, loop, devices, checkpoints and evaluation."""

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
        seed: seed of the initial parameters, the order of the data, and text samples.
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
        """Number of sequences in an evaluation batch: `evaluation.batch_size`, or that of training."""
        return self.evaluation.batch_size or self.data.global_batch

    def _check(self) -> None:
        require(0 <= self.seed < 2**32, f"ExperimentConfig.seed must lie in 0 .. 2**32 - 1, got {self.seed}")
        _ = self.program  # checks that its parts go together

    @property
    def program(self) -> ProgramConfig:
        """The part of the config that the compiled training step depends on.

        Raises:
            InputError: its fields contradict each other, such as a length that is not divisible by the windows.
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
