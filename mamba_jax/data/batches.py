"""The interface between data and training: an object that gives batch number k, from any kind of source."""

import abc
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mamba_jax.data.batch import LMBatch
from mamba_jax.data.config import DataConfig, Documents
from mamba_jax.errors import InputError

# A judgement that catches typing errors: a thousand batches of token ids take gigabytes and help nobody.
_MAX_PREFETCH = 1000
# A judgement: with more threads, they wait for Python's interpreter lock and not for the disk.
_MAX_THREADS = 16


class Batches(abc.ABC):
    """Training batches as a pure function of the step, so that a checkpoint stores nothing of the data but the step.

    Attributes:
        prefetch: batches that `iterate` keeps ready.
    """

    prefetch: int = 2

    @abc.abstractmethod
    def at(self, step: int) -> LMBatch:
        """Batch number `step`, counted from 0: the rows of this process, as numpy arrays."""

    def epochs(self, step: int) -> dict[str, float]:
        """How often the first `step` batches went through the text, by the name of the metric; {} if it has no end."""
        return {}

    def iterate(self, start_step: int) -> Iterator[LMBatch]:
        """`at(start_step)`, `at(start_step + 1)`, ... without end, prepared ahead by background threads."""
        import grain

        options = grain.ReadOptions(num_threads=min(self.prefetch, _MAX_THREADS), prefetch_buffer_size=self.prefetch)
        return iter(grain.MapDataset.range(start_step, sys.maxsize).map(self.at).to_iter_dataset(options))


class Task(abc.ABC):
    """A source that makes whole batches itself, such as a synthetic task, instead of a stream of tokens.

    Attributes:
        identity: JSON object that changes whenever the batches may change; a run refuses to resume if it differs.
        tokens_per_byte: factor from bits per token to bits per byte; 1 counts every token as a byte.
    """

    identity: dict[str, Any]
    tokens_per_byte: float = 1.0

    @abc.abstractmethod
    def batch(self, seed: int, step: int, *, batch_size: int, seq_len: int) -> LMBatch:
        """The batch with the rows of all processes, as a pure function of the arguments.

        Args:
            seed: the seed of the run.
            step: number of the batch, counted from 0. Evaluation uses negative numbers, so that it gets other batches.
            batch_size: B, number of rows over all processes.
            seq_len: L, number of tokens in a row.

        Returns:
            A batch whose `segment_ids` and `continues` are None.
        """


class TaskBatches(Batches):
    """Training batches of a task.

    Args:
        task: makes the batches.
        config: `seq_len`, `global_batch`, `documents`, `order` and `prefetch` are used.
        seed: the seed that the task is called with.
        process_index: p; this process gets the p-th of P equal runs of consecutive rows.
        process_count: P.

    Raises:
        InputError: `order` is "streams", which needs a stream of tokens; or see `check_prefetch` and `process_rows`.
    """

    def __init__(
        self, task: Task, config: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        if config.order == "streams":
            raise InputError(
                f"data.order='streams' goes through a text in order, and a source of kind {config.train.kind!r} makes "
                "its batches one by one: set data.order to 'shuffled'"
            )
        self.prefetch = check_prefetch(config.prefetch)
        self._task, self._config, self._seed = task, config, seed
        self._rows = process_rows(config.global_batch, process_index, process_count, name="data.global_batch")

    def at(self, step: int) -> LMBatch:
        """See `Batches.at`."""
        config = self._config
        whole = self._task.batch(self._seed, step, batch_size=config.global_batch, seq_len=config.seq_len)
        return task_rows(whole, self._rows, config.documents)


def task_rows(batch: LMBatch, rows: range, documents: Documents) -> LMBatch:
    """The given rows of a task's batch; with `documents="packed"`, each row is marked as one document."""
    batch = jax.tree.map(lambda array: array[rows.start : rows.stop], batch)
    if documents == "packed":
        batch = dataclasses.replace(batch, segment_ids=np.zeros(batch.tokens.shape, np.int32))
    return batch


def check_prefetch(prefetch: int) -> int:
    """Returns `prefetch` unchanged if it is a sensible number of batches to keep ready.

    Raises:
        InputError: it is more than `_MAX_PREFETCH`.
    """
    if prefetch > _MAX_PREFETCH:
        raise InputError(f"data.prefetch keeps at most {_MAX_PREFETCH} batches ready, got {prefetch}: lower it")
    return prefetch


def process_rows(batch_size: int, process_index: int, process_count: int, *, name: str) -> range:
    """The rows of a batch that process p of P makes: the p-th of P equal runs of consecutive rows.

    Args:
        batch_size: number of rows over all processes.
        process_index: p.
        process_count: P.
        name: what the batch size is called in the config, for the message.

    Raises:
        InputError: the rows cannot be split evenly.
    """
    if batch_size % process_count:
        raise InputError(f"{name} ({batch_size}) must be divisible by the {process_count} processes: change it")
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)
