"""Properties of drawing a token from logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.errors import InputError
from mamba_jax.generation.sampling import SamplingConfig, sample

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


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(InputError, match=f"sampling {name}"):
        SamplingConfig(**bad)
