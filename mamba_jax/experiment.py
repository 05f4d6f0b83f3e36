"""The config of a whole experiment: model, data, optimizer, loop, devices, checkpoints and evaluation."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic_core import core_schema

from mamba_jax.config_base import Config, require
from mamba_jax.data.config import DataConfig
from mamba_jax.evaluation.config import EvaluationConfig
from mamba_jax.models.config import LoraConfig, ModelConfig
from mamba_jax.sharding.config import MeshConfig
from mamba_jax.training.config import CheckpointConfig, FaultsConfig, OptimizerConfig, ProgramConfig, TrainConfig

# The model of a config that takes it from the weights it begins with; whoever reads a config puts theirs there.
FROM_CHECKPOINT: Any = "from_checkpoint"
if TYPE_CHECKING:
    _Model = ModelConfig
else:

    def _model_or_word(source: Any, schema: Any) -> Any:
        """A schema with which what is wrong in a model is told as if there were no alternative."""
        choices = {"": schema(ModelConfig), FROM_CHECKPOINT: core_schema.literal_schema([FROM_CHECKPOINT])}
        return core_schema.tagged_union_schema(choices, lambda value: FROM_CHECKPOINT if isinstance(value, str) else "")

    _Model = Annotated[ModelConfig | Literal["from_checkpoint"], pydantic.GetPydanticSchema(_model_or_word)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Config):
    """Everything that decides a run's result.

    Attributes:
        name: a short name for logs and plots.
        seed: seed of the initial parameters, the order of the data, and text samples.
        model: the network; or `FROM_CHECKPOINT`, which is the text "from_checkpoint", for that of `train.init_from`.
        data: the text.
        optimizer: the update rule.
        train: the loop.
        mesh: the devices.
        checkpoint: saving.
        evaluation: held-out loss.
        faults: skipped steps and deadlines.
        lora: adapters that are trained in place of the network's parameters.
    """

    name: str
    seed: int = 0
    model: _Model
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    faults: FaultsConfig = FaultsConfig()
    lora: LoraConfig = LoraConfig()

    @property
    def evaluation_batch_size(self) -> int:
        """Number of sequences in an evaluation batch: `evaluation.batch_size`, or that of training."""
        return self.evaluation.batch_size or self.data.global_batch

    def _check(self) -> None:
        """Refuses adapters without weights that they belong to, and what contradicts itself."""
        require(0 <= self.seed < 2**32, f"ExperimentConfig.seed must lie in 0 .. 2**32 - 1, got {self.seed}")
        require(
            self.lora.rank is None or (self.train.init_from or self.train.branch_from) is not None,
            f"lora.rank={self.lora.rank} trains adapters of weights that are there: give train.init_from",
        )
        require(
            self.lora.rank is None or not self.train.init_optimizer,
            f"train.init_optimizer: adapters (lora.rank={self.lora.rank}) begin anew, with their moments: leave it out",
        )
        if self.model != FROM_CHECKPOINT:
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
            lora=self.lora,
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
