"""Log-probabilities of continuations against a plain softmax over the logits of each text alone."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.config import MeshConfig
from mamba_jax.errors import InputError
from mamba_jax.evaluation import scoring, scoring_programs
from mamba_jax.evaluation.scoring import Scorer
from mamba_jax.loaded import Model, load
from mamba_jax.sharding import make_mesh
from tests.evaluation.conftest import SavedRun

GOLDEN = Path(__file__).parents[1] / "golden"
ARCHITECTURES = ("bamba_tiny", "jamba_tiny", "mamba2_tiny", "nemotron_h_tiny", "recurrent_gemma_tiny", "zamba2_tiny")
# Logits of order 10 in float32, with some 100 roundings on the way.
ROUNDING = 10 * 100 * 2.0**-24
# Tokens of contexts and continuations: a single one of either, more tokens than a part, and continuations of several
# parts and of several groups of logits.
LENGTHS = ((1, 1), (14, 2), (3, 20), (30, 5), (2, 70), (9, 9))


@pytest.fixture(scope="module")
def model(saved_run: SavedRun) -> Model:
    return Model(saved_run.config.model, saved_run.params)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 96, context), rng.integers(0, 96, rest)) for context, rest in LENGTHS]


def scorer(model: Model, *, devices: int = 1, **options: int) -> Scorer:
    return Scorer(model.definition, model.params, mesh=make_mesh(MeshConfig(), jax.devices()[:devices]), **options)


def distributions(model: Model, context: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Log-probabilities of all ids at every place of a continuation, in float64."""
    ids = np.concatenate([context, rest])
    # Read with what follows, which nothing may depend on; all texts by one program.
    padded = np.pad(ids, (0, 80 - len(ids)), constant_values=5)
    logits = np.asarray(model(padded[None]).logits[0, len(context) - 1 : len(ids) - 1], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(model: Model, pairs: list[tuple[np.ndarray, np.ndarray]], **options: int) -> None:
    """Every score is that of the text alone, whatever the order and the batch."""
    order = np.random.default_rng(1).permutation(len(pairs))
    scores = scorer(model, **options).score([pairs[index] for index in order])
    for index, score in zip(order, scores, strict=True):
        context, rest = pairs[index]
        expected = distributions(model, context, rest)[np.arange(len(rest)), rest]
        np.testing.assert_allclose(score.log_probabilities, expected, rtol=ROUNDING, atol=ROUNDING)
        assert score.log_probability == pytest.approx(expected.sum(), rel=ROUNDING)


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_size": 2, "part_length": 16}, {"devices": 8}])
def test_equals_a_plain_softmax(model: Model, pairs: list, options: dict[str, int]) -> None:
    check(model, pairs, **options)


def choices(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Continuations of 17, 25 and 40 tokens of context, some of them single tokens, and one without a companion."""
    contexts = [rng.integers(0, 96, length) for length in (17, 25, 40, 30)]
    lengths = (1, 1, 1), (4, 1, 18), (9, 2), (3,)
    return [
        (context, rng.integers(0, 96, size)) for context, own in zip(contexts, lengths, strict=True) for size in own
    ]


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"devices": 8}])
def test_contexts_of_several_continuations_are_read_once(model: Model, options: dict[str, int], monkeypatch) -> None:
    read: list[np.ndarray] = []
    program = scoring.context_program

    def counting(mesh: Any) -> Any:
        return lambda *arguments: read.extend(np.asarray(arguments[4]).tolist()) or program(mesh)(*arguments)

    monkeypatch.setattr(scoring, "context_program", counting)
    check(model, choices(np.random.default_rng(0)), **options)
    assert [length for length in read if length > 1] == [40, 25, 17]


def test_attention_remembers_what_was_read_before(pairs: list) -> None:
    """Parts of a text, and a context of several continuations."""
    model = load(GOLDEN / "llama_tiny", compute_dtype="float32")
    check(model, pairs, batch_size=2, part_length=16)
    check(model, choices(np.random.default_rng(0)), batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(pairs: list, name: str) -> None:
    model = load(GOLDEN / name, compute_dtype="float32")
    check(model, pairs)
    check(model, pairs, batch_size=2, part_length=16)
    check(model, choices(np.random.default_rng(0)))


@pytest.mark.parametrize("context", [[7, 8, 9], list(range(20))])
def test_greedy_is_what_the_model_would_say(model: Model, context: list[int]) -> None:
    """Read with each of its continuations, and once for all."""
    greedy: list[int] = []
    for _ in range(5):
        last = distributions(model, np.array(context), np.array([*greedy, 0]))[-1]
        greedy.append(int(last.argmax()))
    wrong_at_the_end, wrong_at_first = greedy.copy(), greedy.copy()
    wrong_at_the_end[4] += 1
    wrong_at_first[0] += 1
    texts = [greedy, greedy[:1], wrong_at_the_end, wrong_at_first, wrong_at_the_end[:4]]
    scores = scorer(model, batch_size=4).score([(context, text) for text in texts])
    assert [score.is_greedy for score in scores] == [True, True, False, False, True]


def test_few_programs_serve_all_lengths(model: Model) -> None:
    """Up to 32 tokens there are three lengths of rows, here with one number of places to score."""
    rng = np.random.default_rng(0)
    program: Any = scoring_programs.part_program(make_mesh(MeshConfig(), jax.devices()[:1]))
    own = scorer(model, batch_size=2)

    def compiled() -> int:
        before = program._cache_size()
        own.score([(rng.integers(0, 96, n), rng.integers(0, 96, m)) for n in range(1, 30) for m in (1, 3)])
        return program._cache_size() - before

    assert compiled() <= 3
    assert compiled() == 0


def test_contexts_are_cut_from_the_left(model: Model, pairs: list) -> None:
    """So that the model reads `max_length` tokens at most: the last one is only predicted."""
    context, rest = pairs[3]
    cut = scorer(model, max_length=12).score([(context, rest)])
    short = scorer(model).score([(context[-8:], rest)])
    whole = scorer(model).score([(context, rest)])
    np.testing.assert_array_equal(cut[0].log_probabilities, short[0].log_probabilities)
    assert abs(cut[0].log_probability - whole[0].log_probability) > 1e-3


def test_tells_how_far_it_is(model: Model, pairs: list) -> None:
    done: list[int] = []
    scorer(model, batch_size=4).score(pairs, progress=done.append)
    assert done == [4, 6]
    assert scorer(model).score([]) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([1], []), "a continuation has no tokens"),
        (([], [1]), "a context has no tokens"),
        (([1, 264], [1]), "token id 264 is outside the model's vocabulary of 264 ids"),
        (([1], [-1]), "token id -1 is outside"),
        (([1], list(range(13))), "a continuation has 13 tokens, but max_length is 12"),
    ],
)
def test_bad_pairs_are_one_line(model: Model, pair: tuple[list[int], list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scorer(model, max_length=12).score([([1], [2]), pair])


@pytest.mark.parametrize("name", ["batch_size", "max_length", "part_length"])
def test_bad_options_are_one_line(model: Model, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
        scorer(model, **{name: 0})


def test_weights_that_are_not_finite_give_no_score(model: Model) -> None:
    damaged = Model(model.config, jax.tree.map(lambda leaf: leaf * np.nan, model.params))
    with pytest.raises(InputError, match="probabilities are NaN"):
        scorer(damaged).score([([1], [2])])
