"""Properties of drawing a token from logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax import cli
from mamba_jax.errors import InputError
from mamba_jax.generation.sampling import Sampling, SamplingConfig, log_probabilities, row_keys, sample

# Softmax of these is 0.4, 0.3, 0.2, 0.1 in a shuffled order; the last two columns are padding, and the likeliest.
PROBABILITIES = jnp.asarray([0.2, 0.4, 0.1, 0.3])
LOGITS = jnp.concatenate([jnp.log(PROBABILITIES), jnp.asarray([9.0, 8.0])])[None]
DRAWS = 4000


def frequencies(sampling: SamplingConfig) -> np.ndarray:
    tokens = sample(jnp.broadcast_to(LOGITS, (DRAWS, 6)), jax.random.key(0), sampling, vocab_size=4)
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=6) / DRAWS


def expected_frequencies(kept: list[int], temperature: float = 1.0) -> np.ndarray:
    weights = np.zeros(6)
    weights[kept] = np.asarray(PROBABILITIES)[kept] ** (1 / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (SamplingConfig(), [0, 1, 2, 3]),
        (SamplingConfig(temperature=0.5), [0, 1, 2, 3]),
        (SamplingConfig(temperature=0.0), [1]),
        (SamplingConfig(top_k=1), [1]),
        (SamplingConfig(top_k=2), [1, 3]),
        (SamplingConfig(top_k=100), [0, 1, 2, 3]),
        (SamplingConfig(top_p=1.0), [0, 1, 2, 3]),
        (SamplingConfig(top_p=0.8), [0, 1, 3]),
        (SamplingConfig(top_p=0.65), [1, 3]),
        (SamplingConfig(top_p=1e-6), [1]),
        (SamplingConfig(min_p=0.0), [0, 1, 2, 3]),
        (SamplingConfig(min_p=0.6), [1, 3]),
        (SamplingConfig(min_p=0.3), [0, 1, 3]),
        # (0.2 / 0.4)^2 is below 0.3.
        (SamplingConfig(temperature=0.5, min_p=0.3), [1, 3]),
        # Among the three of top_k, 0.4 / 0.9 and 0.3 / 0.9 reach 0.75.
        (SamplingConfig(top_k=3, top_p=0.75), [1, 3]),
    ],
    ids=str,
)
def test_tokens_follow_the_truncated_distribution(sampling: SamplingConfig, kept: list[int]) -> None:
    expected = expected_frequencies(kept, sampling.temperature or 1.0)
    actual = frequencies(sampling)
    assert (actual[expected == 0] == 0).all(), "padding or a truncated token was drawn"
    # The standard error of a frequency is at most 0.5 / sqrt(DRAWS).
    np.testing.assert_allclose(actual, expected, atol=4.5 * 0.5 / DRAWS**0.5)


def test_top_k_and_top_p_treat_rows_apart() -> None:
    logits = jnp.asarray([[5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    for sampling in (SamplingConfig(top_k=1), SamplingConfig(top_p=0.5)):
        np.testing.assert_array_equal(sample(logits, jax.random.key(3), sampling, vocab_size=4), [0, 3])


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-45, 5e-324])
def test_tiny_temperatures_take_the_likeliest_token(temperature: float) -> None:
    logits = jnp.asarray([[-80.0, 3.0, 2.9999998, -jnp.inf], [80.0, 1e30, -3e38, 1e30], [2.0, 1.0, 0.0, -1e-30]])
    keys = jax.random.split(jax.random.key(0), 64)
    draw = jax.vmap(lambda key: sample(logits, key, SamplingConfig(temperature=temperature), vocab_size=4))
    drawn = np.asarray(draw(keys))
    assert set(drawn[:, 0]) == {1}
    assert set(drawn[:, 1]) == {1, 3}, "equal logits stay equally likely"
    assert set(drawn[:, 2]) == {0}


def test_huge_temperatures_draw_all_tokens_alike() -> None:
    logits = jnp.broadcast_to(jnp.asarray([-80.0, 3.0, -jnp.inf, 0.0]), (600, 4))
    for temperature in (1e30, 1e300):
        drawn = sample(logits, jax.random.key(0), SamplingConfig(temperature=temperature), vocab_size=4)
        counts = np.bincount(np.asarray(drawn), minlength=4)
        assert counts[2] == 0
        # Three standard deviations of 200 of 600 draws are 35.
        np.testing.assert_allclose(counts[[0, 1, 3]], 200, atol=40)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (SamplingConfig(temperature=0.0), {1}),
        (SamplingConfig(top_k=1), {1}),
        (SamplingConfig(top_k=3), {1, 2, 4}),
        (SamplingConfig(top_k=100), {0, 1, 2, 4, 5, 6}),
        # Each of the five likeliest has 0.2 less a trifle, so that three reach a half.
        (SamplingConfig(top_p=0.5), {1, 2, 4}),
        (SamplingConfig(top_k=2, top_p=0.7), {1, 2}),
        (SamplingConfig(top_k=2, top_p=0.3), {1}),
        (SamplingConfig(top_p=1.0), {0, 1, 2, 4, 5, 6}),
        (SamplingConfig(min_p=1.0), {1, 2, 4, 5, 6}),
    ],
    ids=str,
)
def test_equal_logits_are_cut_exactly_lowest_ids_first(sampling: SamplingConfig, kept: set[int]) -> None:
    logits = jnp.asarray([-4.0, 0.0, 0.0, -jnp.inf, 0.0, 0.0, 0.0])
    tokens = sample(jnp.broadcast_to(logits, (2000, 7)), jax.random.key(1), sampling, vocab_size=7)
    assert set(np.unique(tokens)) == kept


def test_only_allowed_ids_are_ranked() -> None:
    logits = jnp.broadcast_to(jnp.asarray([0.0, 5.0, 0.5, 9.0, 1.0, 9.0]), (500, 6))
    for allowed, sampling, kept in [
        ([True, False, True, False, True], SamplingConfig(top_k=2), {2, 4}),
        ([True, False, True, False, False], SamplingConfig(), {0, 2}),
        ([True, False, True, False, False], SamplingConfig(temperature=0.0), {2}),
        ([True, False, True, False, True], SamplingConfig(top_p=0.5), {4}),
    ]:
        tokens = sample(logits, jax.random.key(0), sampling, vocab_size=5, allowed=jnp.asarray(allowed))
        assert set(np.unique(tokens)) == kept, allowed


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=0.0), SamplingConfig(top_k=2)], ids=str
)
def test_rows_without_a_token_to_draw_are_marked(sampling: SamplingConfig) -> None:
    inf, nan = jnp.inf, jnp.nan
    logits = jnp.asarray([[0, nan, 1], [nan, nan, nan], [-inf, -inf, -inf], [0, inf, 1], [0, -inf, -inf]])
    np.testing.assert_array_equal(sample(logits, jax.random.key(0), sampling, vocab_size=3), [-1, -1, -1, -1, 0])


def test_draws_depend_on_their_own_row_alone() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 40)) * 2
    configs = [SamplingConfig(), SamplingConfig(temperature=0.0), SamplingConfig(top_k=9), SamplingConfig(top_p=0.8)]
    configs += [SamplingConfig(min_p=0.05)]
    seeds = np.asarray([7, 7, 2**32 - 1, 0, 12], np.uint32)
    settings = Sampling.of(configs)
    order = np.asarray([3, 0, 4, 2, 1])

    def draws(rows: np.ndarray) -> np.ndarray:
        chosen = jax.tree.map(lambda array: array[rows], (logits, seeds, settings))
        return np.stack([_draw(*chosen, np.full(len(rows), position)) for position in range(40)], axis=1)

    together = draws(np.arange(5))
    np.testing.assert_array_equal(draws(order), together[order])
    for row in range(5):
        np.testing.assert_array_equal(draws(np.asarray([row])), together[row : row + 1])
    assert [len(set(row)) > 3 for row in together] == [True, False, True, True, True]


@jax.jit
def _draw(logits: jax.Array, seeds: jax.Array, sampling: Sampling, positions: jax.Array) -> jax.Array:
    return sample(logits, row_keys(seeds, positions), sampling, vocab_size=37)


def test_one_key_stands_for_one_of_each_row() -> None:
    logits = jnp.zeros((6, 50))
    key = jax.random.key(3)
    keys = jnp.stack([jax.random.fold_in(key, row) for row in range(6)])
    together = sample(logits, key, SamplingConfig(), vocab_size=50)
    np.testing.assert_array_equal(together, sample(logits, keys, SamplingConfig(), vocab_size=50))
    np.testing.assert_array_equal(together[:2], sample(logits[:2], key, SamplingConfig(), vocab_size=50))
    assert len(set(np.asarray(together))) > 3


def test_row_keys_are_those_of_seed_and_position() -> None:
    keys = row_keys(np.asarray([5, 2**32 - 1], np.uint32), np.asarray([0, 9]))
    for key, seed, position in zip(keys, (5, 2**32 - 1), (0, 9), strict=True):
        expected = jax.random.fold_in(jax.random.key(np.uint32(seed)), position)
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = np.random.default_rng(0).normal(0, 6, (4, 12)).astype(np.float32)
    logits[:, 10:] = 50
    tokens = np.asarray([0, 9, 4, -1])
    exact = logits[:, :10].astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    actual = log_probabilities(jnp.asarray(logits), tokens, vocab_size=10)
    # A few roundings of numbers below 32.
    np.testing.assert_allclose(actual[:3], exact[range(3), tokens[:3]], rtol=0, atol=4 * 32 * 2.0**-24)
    assert np.isnan(actual[3])


def test_parts_that_no_row_uses_are_absent() -> None:
    plain = Sampling.of([SamplingConfig(temperature=0.5, top_k=3, min_p=0.0), SamplingConfig(logit_bias=())])
    assert (plain.min_p, plain.penalties, plain.logit_bias) == (None, None, None)
    mixed = Sampling.of([SamplingConfig(), SamplingConfig(min_p=0.5, logit_bias=((1, 2.0),))], vocab_size=3)
    np.testing.assert_array_equal(mixed.min_p, np.asarray([0, 0.5], np.float32))
    np.testing.assert_array_equal(mixed.logit_bias, np.asarray([[0, 0, 0], [0, 2, 0]], np.float32))
    assert mixed.penalties is None
    assert Sampling.of([SamplingConfig(), SamplingConfig(presence_penalty=-1.0)]).penalties is not None


def test_settings_are_read_from_flags() -> None:
    flags = [
        "--temperature",
        "0.5",
        "--min-p",
        "0.1",
        "--presence-penalty",
        "-0.5",
        "--logit-bias",
        "5",
        "-1.5",
        "7",
        "-inf",
    ]
    assert cli.parse(SamplingConfig, flags) == SamplingConfig(
        temperature=0.5, min_p=0.1, presence_penalty=-0.5, logit_bias=((5, -1.5), (7, -np.inf))
    )


NAN = float("nan")


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": value} for value in (-0.1, NAN, np.inf)),
        {"top_k": 0},
        *({"top_p": value} for value in (0.0, 1.1, NAN)),
        *({"min_p": value} for value in (-0.1, 1.1, NAN)),
        *({"repetition_penalty": value} for value in (0.0, -1.0, np.inf, NAN)),
        *({name: value} for name in ("presence_penalty", "frequency_penalty") for value in (np.inf, -np.inf, NAN)),
        *({"logit_bias": ((3, value),)} for value in (np.inf, NAN)),
        {"logit_bias": ((-1, 0.5),)},
        {"logit_bias": ((1, 0.5), (2, 0.5), (1, 0.25))},
    ],
    ids=str,
)
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(InputError, match=f"^sampling {name} "):
        SamplingConfig(**bad)


def test_biases_are_checked_against_the_vocabulary() -> None:
    config = SamplingConfig(logit_bias=((3, 1.0),))
    with pytest.raises(InputError, match="token id 3, but the model's ids are 0 to 2"):
        sample(LOGITS, jax.random.key(0), config, vocab_size=3)
    with pytest.raises(InputError, match="give vocab_size"):
        Sampling.of([config])
