"""Measures held-out text during training: one text, or each part of a mixture and their mean."""

from collections.abc import Iterator

from mamba_jax.data.batch import LMBatch
from mamba_jax.data.batches import Task
from mamba_jax.data.mixture import Mixture
from mamba_jax.data.pipeline import evaluation_batches
from mamba_jax.data.shards import TokenDataset
from mamba_jax.evaluation.perplexity import Perplexity, evaluate
from mamba_jax.experiment import ExperimentConfig
from mamba_jax.models.parameters import Params
from mamba_jax.run.stop_requests import StopRequests
from mamba_jax.run.watchdog import Watchdog
from mamba_jax.sharding import process_rows
from mamba_jax.telemetry.metrics import Kind
from mamba_jax.telemetry.run_log import RunLog
from mamba_jax.training.program import TrainProgram


class HeldOut:
    """The held-out text of a run, and what measures it.

    Args:
        config: the experiment.
        program: the model and the devices.
        data: the open text, or mixture of texts.
        log: where results go.
        stop: ends a measurement after the batch at hand.
        watchdog: its deadline moves at each batch.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        program: TrainProgram,
        data: TokenDataset | Task | Mixture,
        log: RunLog,
        *,
        stop: StopRequests,
        watchdog: Watchdog,
    ) -> None:
        self._config, self._program, self._data, self._log = config, program, data, log
        self._stop, self._watchdog = stop, watchdog

    def measure(self, kind: Kind, step: int, params: Params, *, whole: bool) -> Perplexity | None:
        """Measures and records the loss; of a mixture that of every part, and the mean by the parts' weights.

        Args:
            kind: which weights the parameters are.
            step: updates done.
            params: the parameters.
            whole: read all of the text, and not `evaluation.max_batches` of it.

        Returns:
            The loss; None if a stop request cut it short, and nothing is recorded.
        """
        if not isinstance(self._data, Mixture):
            result = self._loss(self._data, step, params, whole=whole)
        else:
            found = {}
            for part in self._data.parts:
                loss = self._loss(part.dataset, step, params, whole=whole)
                if loss is None:
                    return None
                found[part.part.name] = loss
            for name, loss in found.items():
                self._log.evaluation(f"{kind}/{name}", step, loss)
            result = Perplexity.mean(list(found.values()), self._data.weights)
        if result is not None:
            self._log.evaluation(kind, step, result)
        return result

    def _loss(self, data: TokenDataset | Task, step: int, params: Params, *, whole: bool) -> Perplexity | None:
        """Held-out loss on one text; None if a stop request cut it short."""
        index, count = process_rows(self._program.mesh)
        batches = evaluation_batches(
            data,
            seq_len=self._config.data.seq_len,
            documents=self._config.data.documents,
            batch_size=self._config.evaluation_batch_size,
            max_batches=None if whole else self._config.evaluation.max_batches,
            process_index=index,
            process_count=count,
        )
        result = evaluate(
            self._program.definition,
            params,
            self._until_stopped(batches, f"evaluation of step {step}"),
            mesh=self._program.mesh,
            tokens_per_byte=data.tokens_per_byte,
            loss_chunk=self._config.train.loss_chunk,
        )
        return None if self._stop.requested() else result

    def _until_stopped(self, batches: Iterator[LMBatch], doing: str) -> Iterator[LMBatch]:
        """Passes batches on, moving the watchdog's deadline at each; ends after the current one if asked to stop."""
        for batch in batches:
            self._watchdog.arm(self._config.faults.deadline_seconds, doing)
            yield batch
            if self._stop.requested():
                return
