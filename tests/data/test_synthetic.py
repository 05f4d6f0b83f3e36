"""Rows of synthetic tasks hold what they ask for, and follow from seed and step alone."""

import numpy as np
import pytest

from mamba_jax.config import SyntheticSource, from_json
from mamba_jax.data.batch import LMBatch
from mamba_jax.data.pipeline import evaluation_batches
from mamba_jax.errors import InputError


def batch(source: SyntheticSource, length: int, *, rows: int = 64, seed: int = 3, step: int = 5) -> LMBatch:
    return source.open().batch(seed, step, batch_size=rows, seq_len=length)


def asked(found: LMBatch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each row its ids, the places where answers are asked for, and the answers."""
    return [
        (row, np.flatnonzero(mask), targets[mask])
        for row, mask, targets in zip(found.tokens, found.loss_mask, found.targets, strict=True)
    ]


def test_induction_heads() -> None:
    places = set()
    for row, at, answer in asked(batch(SyntheticSource(task="induction_heads", num_ids=16), 9, rows=200)):
        mark, end = np.flatnonzero(row == 15)
        assert (end, at.tolist()) == (8, [8])
        assert row[mark + 1] == answer
        places.add(int(mark))
    assert places == set(range(7))


def test_selective_copying() -> None:
    for row, at, answers in asked(batch(SyntheticSource(task="selective_copying", num_ids=8, items=5), 20)):
        assert at.tolist() == list(range(15, 20))
        assert (row[15:] == 7).all()
        np.testing.assert_array_equal(row[:15][row[:15] > 0], answers)


@pytest.mark.parametrize(("items", "length"), [(1, 4), (4, 16), (5, 64)])
def test_associative_recall(items: int, length: int) -> None:
    source = SyntheticSource(task="associative_recall", num_ids=24, items=items)
    for row, at, answers in asked(batch(source, length)):
        keys, values = row[0 : 2 * items : 2], row[1 : 2 * items : 2]
        assert len({*keys}) == len({*values}) == items
        assert set(keys) <= {*range(1, 12)}
        assert set(values) <= {*range(12, 24)}
        known = dict(zip(keys, values, strict=True))
        assert sorted(row[at]) == sorted(keys)
        assert set(at) <= {*range(2 * items, length, 2)}
        assert [known[key] for key in row[at]] == answers.tolist()


def test_gaps_follow_the_power_law() -> None:
    """The share of queries at distance 0 is p_0 = 1 / sum_i i^(power - 1) where there is one pair."""
    for power in (0.01, 1.0):
        source = SyntheticSource(task="associative_recall", num_ids=8, items=1, power=power)
        found = batch(source, 42, rows=20_000)
        share = np.mean(found.loss_mask[:, 2])
        expected = 1 / np.sum(np.arange(1, 21) ** (power - 1.0))
        # Five standard deviations of a share among 20,000 rows.
        assert abs(share - expected) < 5 * np.sqrt(expected / 20_000)


@pytest.mark.parametrize("task", ["induction_heads", "selective_copying", "associative_recall"])
def test_batches_follow_from_seed_and_step(task: str) -> None:
    source = from_json(SyntheticSource, f'{{"task": "{task}", "num_ids": 32, "items": 2}}', origin="test")
    one = batch(source, 16)
    np.testing.assert_array_equal(one.tokens, batch(source, 16).tokens)
    others = [batch(source, 16, step=6), batch(source, 16, seed=4), batch(source, 16, step=-5)]
    others += evaluation_batches(source.open(), seq_len=16, documents="concatenated", batch_size=64, max_batches=3)
    assert not any(np.array_equal(one.tokens, other.tokens) for other in others)


@pytest.mark.parametrize(
    ("source", "length", "message"),
    [
        (
            SyntheticSource(task="induction_heads", num_ids=16),
            2,
            "'induction_heads' needs rows of 3 ids or more",
        ),
        (SyntheticSource(task="selective_copying", num_ids=16, items=9), 17, "rows of 18 ids or more for 9 items"),
        (SyntheticSource(task="associative_recall", num_ids=64, items=4), 15, "rows of 16 ids or more for 4 pairs"),
        (SyntheticSource(task="associative_recall", num_ids=8, items=4), 16, "more than 8 ids for 4 pairs, got 8"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(source: SyntheticSource, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        batch(source, length)
    with pytest.raises(InputError, match="num_ids must be at least 4, got 3"):
        SyntheticSource(task="induction_heads", num_ids=3)
