"""From a source to batches: for training a pure function of (seed, step), for evaluation every token once."""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mamba_jax import cli
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.batches import Batches, Task, TaskBatches, check_prefetch, process_rows, task_rows
from mamba_jax.data.config import DataConfig, Documents, MixtureSource, Source
from mamba_jax.data.documents import DocumentReader
from mamba_jax.data.mixture import Draws, Mixture, OpenPart
from mamba_jax.data.packing import pack
from mamba_jax.data.prepare import write_shards
from mamba_jax.data.shard_index import INDEX_VERSION, DamagedShards
from mamba_jax.data.shards import ENDS, TokenDataset
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError
from pallas_kernels.common.rounding import ceil_div

# Batches of a task in an evaluation without `max_batches`; a task has no end. A judgement: some ten thousand
# predictions.
_TASK_EVALUATION = 16


def open_source(source: Source, cache_dir: str | Path | DataConfig, tokenizer: Tokenizer) -> TokenDataset | Task:
    """Opens a source; documents are tokenised into `cache_dir` first unless they are there already.

    The name of a cached folder is a hash of the source, of the names, sizes and times of its files, and of the
    tokenizer, so that changed text or another tokenizer never uses an old cache. Before a cached folder is used, all of
    it is compared with its index. A damaged folder is never used again: the text is tokenised into a new folder beside
    it. Processes that share a cache may do all this at the same time.

    Args:
        source: the config of a source, of any registered kind.
        cache_dir: folder that holds a folder for each tokenised source; or a `DataConfig`, whose `cache_dir` is used.
        tokenizer: makes the token ids; if the source holds ids already, it must be the one that made them.

    Returns:
        The token stream, or the task if the source makes its batches itself.

    Raises:
        InputError: the source is missing, damaged or made by another tokenizer.
    """
    opened = source.open()
    if isinstance(opened, DocumentReader):
        opened.read_for(tokenizer)
        folder = cache_dir.cache_dir if isinstance(cache_dir, DataConfig) else cache_dir
        return _open_cache(opened, tokenizer, Path(folder))
    if isinstance(opened, TokenDataset):
        opened.require_vocabulary(tokenizer.vocabulary)
    return opened


def open_data(source: Source, cache_dir: str | Path, tokenizer: Tokenizer) -> TokenDataset | Task | Mixture:
    """Opens a source by `open_source`, or every part of a mixture, all of which must have the ids of the tokenizer.

    Raises:
        InputError: see `open_source`; or a part of a mixture makes whole batches itself.
    """
    if not isinstance(source, MixtureSource):
        return open_source(source, cache_dir, tokenizer)
    parts = []
    for part in source.parts:
        dataset = open_source(part.source, cache_dir, tokenizer)
        if isinstance(dataset, Task):
            raise InputError(
                f"part {part.name!r} of the mixture makes its batches itself (kind {part.source.kind!r}), "
                "and has no windows of text to take: leave it out"
            )
        parts.append(OpenPart(part=part, dataset=dataset))
    return Mixture(tuple(parts))


def train_batches(
    dataset: TokenDataset | Task | Mixture,
    config: DataConfig,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The training batches of opened data; see `TrainBatches`, `TaskBatches` and `MixtureBatches` for the arguments."""
    options = {"seed": seed, "process_index": process_index, "process_count": process_count}
    if isinstance(dataset, Mixture):
        return MixtureBatches(dataset, config, **options)
    if isinstance(dataset, Task):
        return TaskBatches(dataset, config, **options)
    return TrainBatches(dataset, config, **options)


def _open_cache(documents: DocumentReader, tokenizer: Tokenizer, cache: Path) -> TokenDataset:
    """The documents as tokens, from the cache; they are tokenized first if it lacks them or has a damaged copy only."""
    key = json.dumps([INDEX_VERSION, documents.identity, tokenizer.fingerprint], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    damage = None
    # No folder is ever replaced: another process may be reading it, or have just made it.
    for count in itertools.count():
        folder = cache / (f"{name}.{count}" if count else name)
        made = not os.path.lexists(folder)
        if made:
            if damage is not None:
                print(f"tokenised text is damaged and made again: {damage}", file=cli.enduring(sys.stderr), flush=True)
            _write_cache(documents, tokenizer, folder)
        try:
            dataset = TokenDataset(folder)
            dataset.require_vocabulary(tokenizer.vocabulary)
            dataset.check()
            return dataset
        except DamagedShards as error:
            if made:
                raise
            damage = error
    raise AssertionError("there is always a next name")


def _write_cache(documents: DocumentReader, tokenizer: Tokenizer, folder: Path) -> None:
    try:
        write_shards(documents, tokenizer, folder)
    except InputError:
        # If another process has written the folder first, that one is used.
        if not folder.is_dir():
            raise


class TrainBatches(Batches):
    """Training batches of a token stream as a pure function of (seed, step).

    Window i is the L + 1 tokens that begin at token i * L. Neighbouring windows share one token, so that in each epoch
    every token is a target once, except the first and a tail that does not fill a window. The windows of all batches
    form one endless sequence; batch k takes its elements k * B to (k + 1) * B - 1, and process p of P gets the p-th of
    P equal runs of them. So step k sees the same windows whatever the number of processes, threads and restarts.

    - `order="shuffled"`: the windows come in a new random order every epoch; the tail is shorter than a window.
    - `order="streams"`: the windows are cut, in text order, into B equal streams of S windows each; row r of batch k is
      window r * S + k mod S. Each row continues where it ended in batch k - 1, and after S batches all rows start
      again. The tail is shorter than one window for each row.

    Args:
        dataset: the token stream.
        config: `seq_len`, `global_batch`, `documents`, `order` and `prefetch` are used.
        seed: seed of the random order; not used by streams.
        process_index: p.
        process_count: P.

    Raises:
        InputError: the text is shorter than a window, or than a window for each stream; the batch cannot be split over
            the processes; or `prefetch` is larger than `check_prefetch` allows.
    """

    def __init__(
        self, dataset: TokenDataset, config: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        self.prefetch = check_prefetch(config.prefetch)
        self._dataset = dataset
        self._config = config
        self._rows = process_rows(config.global_batch, process_index, process_count, name="data.global_batch")
        _check_length(dataset, config)
        self._num_windows = _num_windows(dataset, config)
        self._stream_windows = self._num_windows // config.global_batch
        self._window = _window_order(self._num_windows, config, f"window order {seed}")

    def at(self, step: int) -> LMBatch:
        """Batch `step`, counted from 0: this process' rows, as numpy arrays."""
        first, length = step * self._config.global_batch, self._config.seq_len
        windows = np.array([self._window(first + row) for row in self._rows])
        tokens, flags = self._dataset.read_flagged(windows * length, length=length + 1)
        batch = pack(tokens, self._config.documents, end_of_document=self._dataset.end_of_document, flags=flags)
        if self._config.order == "shuffled":
            return batch
        return dataclasses.replace(batch, continues=self._continues(windows))

    def epochs(self, step: int) -> dict[str, float]:
        """See `Batches.epochs`; with streams, the text is what all of them hold."""
        batch = self._config.global_batch
        windows = self._num_windows if self._config.order == "shuffled" else self._stream_windows * batch
        return {"epochs": step * batch / windows}

    def _continues(self, windows: np.ndarray) -> np.ndarray:
        continues = windows % self._stream_windows != 0
        if self._config.documents == "packed":
            _, before = self._dataset.read_flagged(np.maximum(windows * self._config.seq_len - 1, 0), length=1)
            continues &= before[:, 0] & ENDS == 0
        return continues


class MixtureBatches(Batches):
    """Training batches of a mixture as a pure function of (seed, step).

    The windows of all batches form one endless sequence, as in `TrainBatches`; `Draws` says which part each is taken
    from. Each part goes through its own windows in an order of its own, which depends on the seed and its name, and is
    another one in each of its epochs.

    Args:
        mixture: the open sources.
        config: `seq_len`, `global_batch`, `documents` and `prefetch` are used.
        seed: seed of the random orders.
        process_index: p; process p gets the p-th of P equal runs of rows.
        process_count: P.

    Raises:
        InputError: a text is shorter than a window, or see `TrainBatches`.
    """

    def __init__(
        self, mixture: Mixture, config: DataConfig, *, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        self.prefetch = check_prefetch(config.prefetch)
        self._config, self._parts = config, mixture.parts
        self._rows = process_rows(config.global_batch, process_index, process_count, name="data.global_batch")
        self._draws = Draws([part.part for part in mixture.parts], config.global_batch)
        for part in mixture.parts:
            _check_length(part.dataset, config, what=f"{part.part.name!r} of the mixture")
        self._windows = [
            _window_order(_num_windows(part.dataset, config), config, f"window order {seed} of {part.part.name}")
            for part in mixture.parts
        ]

    def at(self, step: int) -> LMBatch:
        """See `Batches.at`."""
        length = self._config.seq_len
        drawn = self._draws.at(step * self._config.global_batch + self._rows.start, len(self._rows))
        tokens = np.empty((len(drawn), length + 1), np.int32)
        flags = np.empty(tokens.shape, np.uint8)
        for index, (part, window) in enumerate(zip(self._parts, self._windows, strict=True)):
            rows = [row for row, (own, _) in enumerate(drawn) if own == index]
            starts = np.array([window(drawn[row][1]) for row in rows], np.int64) * length
            tokens[rows], flags[rows] = part.dataset.read_flagged(starts, length=length + 1)
        end_of_document = self._parts[0].dataset.end_of_document
        return pack(tokens, self._config.documents, end_of_document=end_of_document, flags=flags)

    def epochs(self, step: int) -> dict[str, float]:
        """See `Batches.epochs`."""
        counts = self._draws.counts(step * self._config.global_batch)
        return {
            f"epochs/{part.part.name}": count / _num_windows(part.dataset, self._config)
            for part, count in zip(self._parts, counts, strict=True)
        }


def evaluation_batches(
    dataset: TokenDataset | Task,
    *,
    seq_len: int,
    documents: Documents,
    batch_size: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[LMBatch]:
    """Batches in which every token of the stream but the first is a target once, in stream order.

    The last window is filled up with end-of-document tokens, and the last batch with rows of such tokens; `loss_mask`
    is False for all of them.

    Args:
        dataset: the token stream, or a task, which makes as many batches as asked for.
        seq_len: L, number of tokens in a window.
        documents: see `DataConfig`.
        batch_size: number of sequences in a batch, over all processes.
        max_batches: take at most this many batches, spread evenly over the stream; None takes all.
        process_index: p; process p gets the p-th of P equal runs of rows.
        process_count: P.

    Raises:
        InputError: the stream has no target, or the batch cannot be split over the processes.
    """
    rows = process_rows(batch_size, process_index, process_count, name="the evaluation batch size")
    if isinstance(dataset, Task):
        wholes = (
            dataset.batch(0, -1 - index, batch_size=batch_size, seq_len=seq_len)
            for index in range(max_batches or _TASK_EVALUATION)
        )
        return (task_rows(whole, rows, documents) for whole in wholes)
    num_targets = dataset.num_tokens - 1
    if num_targets == 0:
        raise InputError("the evaluation text has a single token, so there is nothing to predict: use more text")
    total = ceil_div(num_targets, seq_len * batch_size)
    count = total if max_batches is None else min(total, max_batches)
    numbers = (index * total // count for index in range(count))
    return (_windows(dataset, np.array(rows) + number * batch_size, seq_len, documents) for number in numbers)


def _windows(dataset: TokenDataset, windows: np.ndarray, length: int, documents: Documents) -> LMBatch:
    """A batch of the windows with the given numbers; `loss_mask` is False beyond the end of the stream."""
    starts = windows * length
    targets = np.clip(dataset.num_tokens - 1 - starts, 0, length)
    tokens = np.full((len(windows), length + 1), dataset.end_of_document, dtype=np.int32)
    flags = np.full(tokens.shape, ENDS, dtype=np.uint8)
    whole = targets == length
    tokens[whole], flags[whole] = dataset.read_flagged(starts[whole], length=length + 1)
    for row in np.flatnonzero((targets > 0) & ~whole):
        own = np.s_[row, : targets[row] + 1]
        tokens[own], flags[own] = dataset.read_flagged(starts[[row]], length=int(targets[row]) + 1)
    batch = pack(tokens, documents, end_of_document=dataset.end_of_document, flags=flags)
    return dataclasses.replace(batch, loss_mask=batch.loss_mask & (np.arange(length)[None] < targets[:, None]))


def _num_windows(dataset: TokenDataset, config: DataConfig) -> int:
    return (dataset.num_tokens - 1) // config.seq_len


def _check_length(dataset: TokenDataset, config: DataConfig, *, what: str = "the training text") -> None:
    """Refuses a data set that has fewer tokens than its order needs for a single batch or window."""
    if config.order == "streams":
        rows, size, remedy = config.global_batch, "data.global_batch * data.seq_len + 1", "a smaller batch or seq_len"
    else:
        rows, size, remedy = 1, "data.seq_len + 1", "a shorter seq_len"
    needed = rows * config.seq_len + 1
    if dataset.num_tokens < needed:
        raise InputError(
            f"{what} has {dataset.num_tokens} tokens, fewer than {size} = {needed}, which "
            f"data.order={config.order!r} needs: use more text or {remedy}"
        )


def _window_order(num_windows: int, config: DataConfig, name: str) -> Callable[[int], int]:
    """A function from n to the window that is element n of an endless sequence.

    Args:
        num_windows: windows to go through.
        config: `order` and, for streams, `global_batch` are used.
        name: names a shuffled sequence: another one has another order.
    """
    import grain

    if config.order == "streams":
        streams, length = config.global_batch, num_windows // config.global_batch
        return lambda n: n % streams * length + n // streams % length
    # Grain seeds epoch e with seed + e, so consecutive run seeds must be spread far apart.
    order_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    # Grain's types allow for elements that a filter removed; there is no filter here.
    order: Any = grain.MapDataset.range(num_windows).shuffle(seed=order_seed).repeat(None)
    return lambda n: order[n]
