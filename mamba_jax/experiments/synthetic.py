"""Runs on synthetic tasks, and their metric: the share of answers that a model gives."""

import dataclasses

import jax

from mamba_jax.data.config import DataConfig, SyntheticSource, TokenizerConfig
from mamba_jax.data.pipeline import evaluation_batches
from mamba_jax.evaluation.answers import measure_answers
from mamba_jax.evaluation.config import EvaluationConfig
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.experiments.declaration import Metric
from mamba_jax.export.load import LoadedCheckpoint
from mamba_jax.models.config import Hybrid, ModelConfig
from mamba_jax.models.mixers.declaration import MixerConfig
from mamba_jax.models.parameters import define
from mamba_jax.sharding import batch_shards, make_mesh, replicated
from mamba_jax.sharding.config import MeshConfig
from mamba_jax.training.config import CheckpointConfig, OptimizerConfig, TrainConfig, WarmupStableDecaySchedule
from pallas_kernels.common.rounding import ceil_div, round_up

# Lines of metrics in a run, and saves: a device must not wait for records of steps that take a millisecond.
_LINES, _SAVES = 25, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much a model is trained and asked.

    Attributes:
        seq_len: L, ids of a row.
        rows: of a batch.
        steps: updates, all with the same learning rate.
        learning_rate: of Adam, without weight decay.
        tested: rows of a metric.
    """

    seq_len: int
    rows: int
    steps: int
    learning_rate: float
    tested: int

    @property
    def text(self) -> str:
        """The same as sentences."""
        return (
            f"Trained on {self.rows} rows of {self.seq_len:,} ids at a time, {self.steps:,} updates at the constant "
            f"learning rate {self.learning_rate:g} (Adam without weight decay); {self.tested:,} "
            "rows are asked for each number."
        )


def synthetic_run(
    name: str, source: SyntheticSource, mixer: MixerConfig | Hybrid, *, width: int, size: Size, batch_tested: int = 64
) -> ExperimentConfig:
    """Two layers on a synthetic task, in float32, as the papers train them.

    Args:
        name: of the run.
        source: the task.
        mixer: of both layers.
        width: D.
        size: how much the model is trained and asked.
        batch_tested: rows that are asked at once.
    """
    every = size.steps // _SAVES
    return ExperimentConfig(
        name=name,
        model=ModelConfig(
            vocab_size=source.num_ids + 1,
            d_model=width,
            num_layers=2,
            mixer=mixer,
            compute_dtype="float32",
            remat="none",
        ),
        data=DataConfig(
            train=source,
            validation=source,
            tokenizer=TokenizerConfig(kind="ids", num_ids=source.num_ids),
            seq_len=size.seq_len,
            global_batch=size.rows,
            documents="concatenated",
        ),
        optimizer=OptimizerConfig(
            peak_lr=size.learning_rate,
            schedule=WarmupStableDecaySchedule(warmup_steps=0, decay_steps=0),
            b2=0.999,
            weight_decay=0.0,
        ),
        train=TrainConfig(num_steps=size.steps, run_dir=f"runs/{name}", log_every=size.steps // _LINES),
        checkpoint=CheckpointConfig(every=every, keep=1),
        evaluation=EvaluationConfig(every=every, max_batches=4, batch_size=min(batch_tested, size.tested)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerAccuracy(Metric):
    """Percentage of right answers in rows that training never sees.

    Attributes:
        source: the task.
        seq_len: L, ids of a row.
        num_rows: rows, rounded up to whole batches.
        whole_rows: count the rows all of whose answers are right, not answers.
    """

    source: SyntheticSource
    seq_len: int
    num_rows: int
    whole_rows: bool = False

    def measure(self, trained: LoadedCheckpoint) -> float:
        """See `Metric.measure`; a batch has as many rows as in evaluations of the run."""
        assert trained.experiment is not None
        mesh = make_mesh(MeshConfig())
        rows = round_up(min(trained.experiment.evaluation_batch_size, self.num_rows), batch_shards(mesh))
        batches = evaluation_batches(
            self.source.open(),
            seq_len=self.seq_len,
            documents="concatenated",
            batch_size=rows,
            max_batches=ceil_div(self.num_rows, rows),
        )
        params = jax.device_put(trained.params, replicated(mesh))
        found = measure_answers(define(trained.config), params, batches, mesh=mesh)
        return 100 * (found.exact_match if self.whole_rows else found.accuracy)
