"""A mixture meets its shares at every step, and each of its texts is gone through as it would be alone."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_jax.config import DataConfig, MixturePart, MixtureSource, ShardSource
from mamba_jax.data.mixture import Draws, Mixture
from mamba_jax.data.pipeline import MixtureBatches, open_data, open_source, train_batches
from mamba_jax.data.shards import TokenDataset
from mamba_jax.data.tokenizer import ByteTokenizer, make_tokenizer
from mamba_jax.errors import InputError
from tests.data.conftest import MakeStream
from tests.data.test_pipeline import assert_equal, join
from tests.data.test_tokenizer import train_bpe
from tests.toys.source import CopySource

MakeConfig = Callable[..., DataConfig]


def make_part(name: str, weight: float = 1.0, *schedule: tuple[int, float], path: str = "none") -> MixturePart:
    return MixturePart(name=name, source=ShardSource(path=path), weight=weight, schedule=schedule)


THREE = [make_part("a", 0.7), make_part("b", 0.2), make_part("c", 0.1)]
CHANGING = [make_part("a", 3.0, (40, 1.0)), make_part("b", 0.0, (20, 0.0), (60, 2.0)), make_part("c", 1.0)]
MANY = [make_part(f"p{i}", 1.0 + i / 7) for i in range(11)]


@pytest.mark.parametrize("windows", [1, 4, 17])
@pytest.mark.parametrize("parts", [THREE, CHANGING, MANY, THREE[:1]], ids=["three", "changing", "many", "one"])
def test_every_window_of_a_part_is_drawn_once_in_order_and_shares_are_met(
    parts: list[MixturePart], windows: int
) -> None:
    """The sums of shares are added up here step by step; `Draws` has them in closed form."""
    draws, steps = Draws(parts, windows), 100
    drawn = draws.at(0, steps * windows)
    knots = sorted({0, *(step for part in parts for step, _ in part.schedule)})
    due = [Fraction(0)] * len(parts)
    for step in range(steps):
        so_far = drawn[: step * windows]
        counts = Counter(part for part, _ in so_far)
        assert draws.counts(step * windows) == [counts[i] for i in range(len(parts))]
        assert all(abs(counts[i] - due[i]) <= Fraction(len(parts) + 1, 2) for i in range(len(parts))), step
        before, after = max(k for k in knots if k <= step), min((k for k in knots if k > step), default=None)
        for i, part in enumerate(parts):
            share = _share(parts, part, before)
            if after is not None:
                share += (_share(parts, part, after) - share) * Fraction(step - before, after - before)
            due[i] += windows * share
    for i in range(len(parts)):
        numbers = [number for part, number in drawn if part == i]
        assert numbers == list(range(len(numbers)))


def _share(parts: list[MixturePart], part: MixturePart, step: int) -> Fraction:
    """A part's weight over the sum of all, each interpolated by numpy."""
    weights = {}
    for each in parts:
        steps, values = zip((0, each.weight), *each.schedule, strict=True)
        weights[each.name] = Fraction(float(np.interp(step, steps, values))).limit_denominator(10**9)
    return weights[part.name] / sum(weights.values())


def test_any_window_is_found_without_those_before_it() -> None:
    draws = Draws(CHANGING, 5)
    drawn = draws.at(0, 600)
    for first, count in ((0, 1), (7, 20), (299, 2), (311, 289)):
        assert draws.at(first, count) == drawn[first : first + count]
    far = 10**12
    assert draws.at(far, 7)[3:] == draws.at(far + 3, 4)
    # Weights at the end are 1, 2, 1.
    for count, share in zip(draws.counts(far), (1 / 4, 1 / 2, 1 / 4), strict=True):
        assert count / far == pytest.approx(share, abs=1e-9)


def test_a_weight_of_zero_draws_nothing_until_its_schedule_does() -> None:
    drawn = Draws(CHANGING, 8).at(0, 8 * 60)
    first = next(place for place, (part, _) in enumerate(drawn) if part == 1)
    assert first > 8 * 20


def test_the_windows_of_a_batch_are_spread() -> None:
    drawn = [part for part, _ in Draws([make_part("a", 3.0), make_part("b")], 8).at(0, 16)]
    assert max(len(list(run)) for _, run in itertools.groupby(drawn)) <= 4


@pytest.fixture
def open_mixture(make_stream: MakeStream, tmp_path: Path) -> Callable[..., Mixture]:
    """Streams of the given lengths, whose windows of eight ids are unique, as a mixture."""

    def make(*parts: tuple[str, int, float], **schedules: tuple[tuple[int, float], ...]) -> Mixture:
        found = []
        for place, (name, length, weight) in enumerate(parts):
            rng = np.random.default_rng(place)
            if not (tmp_path / name).exists():
                make_stream([rng.integers(0, 256, size=length - 1).tolist()], name=name)
            found.append(make_part(name, weight, *schedules.get(name, ()), path=str(tmp_path / name)))
        opened = open_data(MixtureSource(parts=tuple(found)), tmp_path / "cache", ByteTokenizer())
        assert isinstance(opened, Mixture)
        return opened

    return make


def windows_of(dataset: TokenDataset, tokens: np.ndarray) -> list[int]:
    """Window numbers of the rows that are of a data set, found by their content."""
    count = (dataset.num_tokens - 1) // 8
    number = {row.tobytes(): i for i, row in enumerate(dataset.read(np.arange(count) * 8, length=8))}
    return [number[row.tobytes()] for row in tokens if row.tobytes() in number]


def test_each_text_is_gone_through_in_epochs_of_its_own(
    open_mixture: Callable[..., Mixture], make_config: MakeConfig
) -> None:
    mixture = open_mixture(("long", 801, 0.5), ("short", 81, 0.5))
    batches = MixtureBatches(mixture, make_config(), seed=3)
    tokens = np.concatenate([batches.at(step).tokens for step in range(25)])
    long, short = (windows_of(part.dataset, tokens) for part in mixture.parts)
    assert (len(long), len(short)) == (100, 100)
    assert sorted(long) == list(range(100))
    epochs = np.array(short).reshape(10, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(10), (10, 10)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 10
    assert batches.epochs(25) == {"epochs/long": 1.0, "epochs/short": 10.0}
    # The order of a text depends on its name, and not on what it is mixed with.
    other = open_mixture(("third", 401, 1.0), ("short", 81, 1.0))
    found = np.concatenate([MixtureBatches(other, make_config(), seed=3).at(step).tokens for step in range(5)])
    assert windows_of(other.parts[1].dataset, found) == short[:20]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_and_restarts_see_the_same_batches(
    open_mixture: Callable[..., Mixture], make_config: MakeConfig, process_count: int
) -> None:
    config = make_config(prefetch=3)
    mixture = open_mixture(("a", 801, 0.6), ("b", 401, 0.3), ("c", 81, 0.1), a=((5, 0.1),))
    whole = train_batches(mixture, config, seed=1)
    parts = [
        train_batches(mixture, config, seed=1, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for step in (0, 1, 7, 1000):
        assert_equal(join([part.at(step) for part in parts]), whole.at(step))
    again = train_batches(mixture, config, seed=1)
    for step, batch in enumerate(itertools.islice(again.iterate(4), 6), 4):
        assert_equal(batch, whole.at(step))
    assert not np.array_equal(train_batches(mixture, config, seed=2).at(0).tokens, whole.at(0).tokens)


def test_a_window_of_a_text_is_packed_as_alone(open_mixture: Callable[..., Mixture], make_config: MakeConfig) -> None:
    batch = MixtureBatches(open_mixture(("a", 801, 1.0)), make_config(), seed=0).at(2)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.loss_mask.all()
    assert batch.segment_ids is not None
    assert batch.continues is None


def test_the_identity_is_that_of_every_source(open_mixture: Callable[..., Mixture]) -> None:
    mixture = open_mixture(("a", 801, 0.6), ("b", 401, 0.4))
    assert mixture.identity == {part.part.name: part.dataset.identity for part in mixture.parts}
    assert mixture.identity["a"]["tokens"] == 801


def parts_of(*parts: MixturePart) -> Callable[[], Any]:
    return lambda: MixtureSource(parts=parts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (parts_of(), "MixtureSource.parts is empty: give at least one MixturePart"),
        (parts_of(make_part("a"), make_part("a")), "MixtureSource.parts: two are called 'a'; names must differ"),
        (lambda: make_part("a/b"), "MixturePart.name must have 1 to 64 letters, digits, dots, dashes or underscores"),
        (lambda: make_part("a", -0.5), "the weight of 'a' at step 0 must not be negative, got -0.5"),
        (lambda: make_part("a", 1.0, (9, -1.0)), "the weight of 'a' at step 9 must not be negative, got -1.0"),
        (lambda: make_part("a", np.nan), "MixturePart.weight: Input should be a finite number"),
        (lambda: make_part("a", 1.0, (9, np.nan)), "MixturePart.schedule.0.1: Input should be a finite number"),
        (
            lambda: make_part("a", 1.0, (9, 1.0), (9, 2.0)),
            "the steps in the schedule of 'a' must rise from 1 on, got 9",
        ),
        (lambda: make_part("a", 1.0, (0, 1.0)), "the steps in the schedule of 'a' must rise from 1 on, got 0 behind 0"),
        (parts_of(make_part("a", 0.0), make_part("b", 0.0)), "the weights of 'a', 'b' sum to 0 at step 0: make one"),
        (
            parts_of(make_part("a", 1.0, (10, 0.0)), make_part("b", 0.0, (30, 0.0))),
            "the weights of 'a', 'b' sum to 0 at step 10: make one positive",
        ),
    ],
)
def test_bad_mixtures_are_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_mixtures_that_do_not_go_with_the_rest_are_refused(
    make_config: MakeConfig, open_mixture: Callable[..., Mixture], make_stream: MakeStream, tmp_path: Path
) -> None:
    mixture = MixtureSource(parts=(make_part("a"),))
    with pytest.raises(InputError, match="goes through one text in order, and a mixture takes turns"):
        make_config(train=mixture, order="streams")
    with pytest.raises(InputError, match=r"data\.validation: 'b' has a schedule, and held-out text has none"):
        make_config(validation=MixtureSource(parts=(make_part("b", 1.0, (5, 2.0)),)))
    with pytest.raises(InputError, match="'tiny' of the mixture has 5 tokens, fewer than"):
        MixtureBatches(open_mixture(("long", 801, 0.5), ("tiny", 5, 0.5)), make_config(), seed=0)
    tasks = MixtureSource(parts=(MixturePart(name="copy", source=CopySource()),))
    with pytest.raises(InputError, match="part 'copy' of the mixture makes its batches itself"):
        open_data(tasks, tmp_path, ByteTokenizer())


def test_sources_of_different_tokenizers_are_refused(make_stream: MakeStream, tmp_path: Path) -> None:
    make_stream([[1, 2, 3]], name="bytes")
    bpe = make_tokenizer(train_bpe(tmp_path / "bpe.json"))
    mixture = MixtureSource(parts=(make_part("a", path=str(tmp_path / "bytes")),))
    with pytest.raises(InputError, match=r"bytes was made by another tokenizer \(vocabulary 257, here \d+\): set data"):
        open_data(mixture, tmp_path / "cache", bpe)


def test_a_plain_source_opens_as_before(make_stream: MakeStream, tmp_path: Path) -> None:
    make_stream([[1, 2, 3]], name="bytes")
    source = ShardSource(path=str(tmp_path / "bytes"))
    opened, plain = open_data(source, tmp_path, ByteTokenizer()), open_source(source, tmp_path, ByteTokenizer())
    assert isinstance(opened, TokenDataset)
    assert opened.identity == plain.identity
    assert dataclasses.replace(MixtureSource(parts=(make_part("x", path="y"),))).place == "y"
