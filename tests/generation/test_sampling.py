"""Properties of drawing a token from logits."""

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


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_bad_settings_are_named(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(InputError, match=f"sampling {name}"):
        SamplingConfig(**bad)
