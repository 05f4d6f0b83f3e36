"""Synthetic tasks: rows of random ids in which a model has to find the answers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from mamba_jax.data.batch import LMBatch
from mamba_jax.data.batches import Task
from mamba_jax.data.config import SyntheticSource
from mamba_jax.errors import InputError

# Rows of ids, and the answer behind each of them, or -1 where none is asked for; both (B, L).
Rows = tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]
_NONE = -1


class SyntheticTask(Task):
    """Batches of a synthetic task; answers alone count in the loss.

    Args:
        source: the task, its vocabulary V and its number of items M.
    """

    def __init__(self, source: SyntheticSource) -> None:
        self._source = source
        self._rows = _TASKS[source.task]
        self.identity: dict[str, Any] = dataclasses.asdict(source)

    def batch(self, seed: int, step: int, *, batch_size: int, seq_len: int) -> LMBatch:
        """See `Task.batch`.

        Raises:
            InputError: the rows are too short for the items, or the ids too few.
        """
        # numpy takes no negative seeds, and evaluation has negative steps.
        rng = np.random.default_rng([seed, abs(step), step < 0])
        tokens_BL, answers_BL = self._rows(rng, self._source, batch_size, seq_len)
        is_asked_BL = answers_BL != _NONE
        targets_BL = np.where(is_asked_BL, answers_BL, 0)
        return LMBatch(tokens=tokens_BL, targets=targets_BL, loss_mask=is_asked_BL, segment_ids=None)


def induction_heads(rng: np.random.Generator, source: SyntheticSource, rows: int, length: int) -> Rows:
    """Random ids, one of which is marked by the id V - 1 in front of it; the mark at the end asks for it again.

    Source: arXiv 2312.00752, section 4.1.2 and appendix E.1.2.
    """
    _require(source, length >= 3, f"rows of 3 ids or more, got {length}")
    mark = source.num_ids - 1
    tokens_BL = rng.integers(0, mark, (rows, length), dtype=np.int32)
    place_B1 = rng.integers(0, length - 2, (rows, 1))
    answers_BL = np.full((rows, length), _NONE, np.int32)
    answers_BL[:, -1:] = np.take_along_axis(tokens_BL, place_B1 + 1, axis=1)
    np.put_along_axis(tokens_BL, place_B1, mark, axis=1)
    tokens_BL[:, -1] = mark
    return tokens_BL, answers_BL


def selective_copying(rng: np.random.Generator, source: SyntheticSource, rows: int, length: int) -> Rows:
    """M random ids 1 .. V - 2 at random places among zeros, then M times V - 1, each of which asks for the next one.

    Source: arXiv 2312.00752, section 4.1.1 and appendix E.1.1.
    """
    items, mark = source.items, source.num_ids - 1
    _require(source, length >= 2 * items, f"rows of {2 * items} ids or more for {items} items, got {length}")
    wanted_BM = rng.integers(1, mark, (rows, items), dtype=np.int32)
    tokens_BL, answers_BL = np.zeros((rows, length), np.int32), np.full((rows, length), _NONE, np.int32)
    places_BM = np.sort(_distinct(rng, np.zeros(length - items), rows, items), axis=1)
    np.put_along_axis(tokens_BL, places_BM, wanted_BM, axis=1)
    tokens_BL[:, length - items :] = mark
    answers_BL[:, length - items :] = wanted_BM
    return tokens_BL, answers_BL


def associative_recall(rng: np.random.Generator, source: SyntheticSource, rows: int, length: int) -> Rows:
    """M pairs of key and value, then every key once more among random ids; behind it its value is asked for.

    Keys are M of the ids 1 .. V/2 - 1, values M of V/2 .. V - 1. Queries stand at even distances g behind the pairs,
    drawn without replacement with probabilities proportional to (g/2 + 1)^(power - 1).

    Source: arXiv 2312.04927, section 4 and appendix E (multi-query associative recall), as its authors' code has it.
    """
    items, half = source.items, source.num_ids // 2
    places = length // 2 - items
    _require(source, places >= items, f"rows of {4 * items} ids or more for {items} pairs, got {length}")
    _require(source, half > items, f"more than {2 * items} ids for {items} pairs, got {source.num_ids}")
    keys_BM = 1 + rng.permuted(_distinct(rng, np.zeros(half - 1), rows, items), axis=1)
    values_BM = half + rng.permuted(_distinct(rng, np.zeros(source.num_ids - half), rows, items), axis=1)
    log_odds = (source.power - 1) * np.log(np.arange(1, places + 1))
    # Keys come in random order already.
    queries_BM = 2 * (items + _distinct(rng, log_odds, rows, items))
    tokens_BL = rng.integers(0, source.num_ids, (rows, length), dtype=np.int32)
    answers_BL = np.full((rows, length), _NONE, np.int32)
    tokens_BL[:, 0 : 2 * items : 2], tokens_BL[:, 1 : 2 * items : 2] = keys_BM, values_BM
    np.put_along_axis(tokens_BL, queries_BM, keys_BM.astype(np.int32), axis=1)
    np.put_along_axis(answers_BL, queries_BM, values_BM.astype(np.int32), axis=1)
    return tokens_BL, answers_BL


_TASKS: dict[str, Callable[[np.random.Generator, SyntheticSource, int, int], Rows]] = {
    "induction_heads": induction_heads,
    "selective_copying": selective_copying,
    "associative_recall": associative_recall,
}


def _distinct(rng: np.random.Generator, log_odds: np.ndarray, rows: int, count: int) -> Int[np.ndarray, "B M"]:
    """For each row `count` different indices, drawn one after the other by their odds; in no particular order.

    The largest of log-odds with independent Gumbel noise are such a draw (arXiv 1903.06059, section 2.3).
    """
    noise = rng.gumbel(size=(rows, len(log_odds))) if log_odds.any() else rng.random((rows, len(log_odds)), np.float32)
    kth = len(log_odds) - count
    return np.argpartition(noise + log_odds.astype(noise.dtype), kth, axis=1)[:, kth:]


def _require(source: SyntheticSource, holds: bool, needed: str) -> None:
    if not holds:
        raise InputError(
            f"the task {source.task!r} needs {needed}: change data.seq_len or the task's items and num_ids"
        )
