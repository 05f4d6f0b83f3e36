"""How many of the answers that a task asks for a model gives, in rows of any length."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from mamba_jax.data.batch import LMBatch
from mamba_jax.errors import InputError
from mamba_jax.evaluation.scoring_programs import Part, part_program
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import init_state, is_endless
from mamba_jax.sharding import put_batch

# Tokens of all rows that are read at once. A judgement: enough for a GPU to be busy, at 1 KiB of activations a token
# a quarter of a gigabyte.
_PART_TOKENS = 2**18
# Tokens of a row that are, where attention sets each of them against all before.
_SHORTEST_PART = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered.

    Attributes:
        accuracy: share of the answers that are the likeliest ids at their places.
        exact_match: share of the rows all of whose answers are right.
        loss: mean -log p of an answer, in nats.
        num_answers: answers asked for.
        num_rows: rows that were read.
    """

    accuracy: float
    exact_match: float
    loss: float
    num_answers: int
    num_rows: int


def measure_answers(
    definition: ModelDefinition,
    params: Params,
    batches: Iterable[LMBatch],
    *,
    mesh: Mesh,
    part_length: int | None = None,
) -> Answers:
    """Reads batches, and compares the likeliest id with the target wherever `loss_mask` is set.

    Rows longer than a part are read part by part with the state handed on, so memory does not grow with their length;
    only attention without a window keeps all tokens. Segments are not looked at: a row is one document.

    Args:
        definition: the model.
        params: its parameters, on the devices of the mesh.
        batches: batches with all their rows.
        mesh: the device mesh, of one process.
        part_length: tokens of a row that are read at once; None means some 2**18 tokens of all rows, and 1,024 of each
            for attention without a window.

    Raises:
        InputError: nothing is asked for, or the model's probabilities are not numbers.
    """
    most = _PART_TOKENS if is_endless(definition.config) else 0
    found = [
        _read(definition, params, batch, mesh, part_length or max(most // len(batch.tokens), _SHORTEST_PART))
        for batch in batches
    ]
    num_answers, num_rows = (sum(int(count.sum()) for _, _, count in found), sum(len(count) for _, _, count in found))
    if num_answers == 0:
        raise InputError("the batches ask for no answers: loss_mask is empty")
    loss = -math.fsum(log_p for log_p, _, _ in found) / num_answers
    if math.isnan(loss):
        raise InputError("the model's probabilities are NaN: its weights are not finite, take another step")
    return Answers(
        accuracy=sum(int(right.sum()) for _, right, _ in found) / num_answers,
        exact_match=sum(int((right == count).sum()) for _, right, count in found) / num_rows,
        loss=loss,
        num_answers=num_answers,
        num_rows=num_rows,
    )


def _read(
    definition: ModelDefinition, params: Params, batch: LMBatch, mesh: Mesh, part_length: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Sum of log p over a batch's answers, and for each row how many are right, and how many there are, (B,)."""
    rows, length = batch.tokens.shape
    counted, scored = [], []
    with jax.set_mesh(mesh):
        state = None
        if length > part_length:
            room = None if is_endless(definition.config) else length
            state = init_state(definition.config, rows, max_length=room)
        for begin in range(0, length, part_length):
            part, is_asked = _part(batch, slice(begin, begin + part_length))
            one, state = part_program(mesh)(definition, params, put_batch(mesh, part), state)
            scored.append(one)
            counted.append(is_asked)
            # Processes on CPUs deadlock once 32 programs are in flight.
            jax.block_until_ready(scored[-2:-1])
    log_p_BA, is_right_BA = (np.concatenate(parts, axis=1) for parts in zip(*jax.device_get(scored), strict=True))
    is_asked_BA = np.concatenate(counted, axis=1)
    log_p = np.sum(log_p_BA, where=is_asked_BA, dtype=np.float64)
    return float(log_p), (is_right_BA & is_asked_BA).sum(axis=1), is_asked_BA.sum(axis=1)


def _part(batch: LMBatch, part: slice) -> tuple[Part, np.ndarray]:
    """A part of the rows with the places in it where answers are asked for, and which of these are one, (B, A)."""
    mask_BT = np.asarray(batch.loss_mask[:, part])
    most = int(mask_BT.sum(axis=1).max())
    places_BA = np.argsort(~mask_BT, axis=1, stable=True)[:, :most].astype(np.int32)
    targets_BA = np.take_along_axis(np.asarray(batch.targets[:, part]), places_BA, axis=1)
    is_asked_BA = np.take_along_axis(mask_BT, places_BA, axis=1)
    return Part(tokens=batch.tokens[:, part], places=places_BA, targets=targets_BA), is_asked_BA
