"""Penalties, biases and cuts give the distribution that NumPy computes in float64, and it is the one drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.errors import InputError
from mamba_jax.generation.penalties import History
from mamba_jax.generation.sampling import Sampling, SamplingConfig, log_distribution, row_keys, sample

VOCAB, PADDED = 12, 16
# Each row has another mixture; all of them see the same prompt and continuation.
CONFIGS = [
    SamplingConfig(),
    SamplingConfig(repetition_penalty=1.7),
    SamplingConfig(repetition_penalty=0.6, temperature=0.7),
    SamplingConfig(presence_penalty=1.5),
    SamplingConfig(frequency_penalty=0.8, presence_penalty=-0.4),
    SamplingConfig(logit_bias=((3, 2.5), (11, -np.inf), (0, -4.0))),
    SamplingConfig(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((4, 3.0),), temperature=1.6, top_k=7),
    SamplingConfig(repetition_penalty=1.3, presence_penalty=0.9, top_p=0.8, min_p=0.1),
    SamplingConfig(temperature=0.0, repetition_penalty=4.0, logit_bias=((7, 1.0),)),
    SamplingConfig(min_p=0.2, temperature=2.0),
]
PROMPT = [2, 5, 5, 9]
CONTINUATION = [1, 5, 1, 1, 8]
ALLOWED = np.arange(VOCAB) != 6


def exact(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The probabilities of one row in float64, token by token as the settings are described."""
    scores = logits[:VOCAB].astype(np.float64)
    for token in {*PROMPT, *CONTINUATION}:
        penalty = config.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(CONTINUATION):
        scores[token] -= config.presence_penalty + config.frequency_penalty * CONTINUATION.count(token)
    for token, bias in config.logit_bias:
        scores[token] += bias
    scores[~ALLOWED] = -np.inf
    if config.temperature == 0:
        return np.eye(VOCAB)[scores.argmax()]
    probabilities = np.exp((scores - scores.max()) / config.temperature)
    ranked = sorted(range(VOCAB), key=lambda token: -probabilities[token])
    kept = ranked[: config.top_k or VOCAB]
    total, mass = probabilities[kept].sum(), 0.0
    nucleus = []
    for token in kept:
        if mass < (config.top_p or 1):
            nucleus.append(token)
        mass += probabilities[token] / total
    keeps = [token for token in nucleus if probabilities[token] >= (config.min_p or 0)]
    probabilities[[token for token in range(VOCAB) if token not in keeps]] = 0
    return probabilities / probabilities.sum()


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    values = np.random.default_rng(4).normal(0, 2, (len(CONFIGS), PADDED)).astype(np.float32)
    values[:, VOCAB:] = 30
    return values


def history_of(rows: int) -> History:
    # The 0 behind each prompt is padding, and the -1 behind the continuation no token: neither counts.
    history = History.of(np.asarray([[*PROMPT, 0]] * rows), np.full(rows, 4), vocab_size=VOCAB)
    for token in [*CONTINUATION, -1]:
        history = _added(history, jnp.full(rows, token))
    return history


_added = jax.jit(History.added)
_log_distribution = jax.jit(log_distribution, static_argnames="vocab_size")
_sample = jax.jit(sample, static_argnames="vocab_size")


def test_history_counts_tokens() -> None:
    history = History.of(np.asarray([[1, 1, 4], [2, 0, 3]]), np.asarray([3, 1]), vocab_size=5)
    np.testing.assert_array_equal(history.in_prompt, [[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(history.counts, np.zeros((2, 5)))
    for tokens in ([4, 0], [4, -1], [2, 0]):
        history = _added(history, jnp.asarray(tokens))
    np.testing.assert_array_equal(history.counts, [[0, 0, 1, 0, 2], [2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(history.in_prompt, [[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]])


def test_the_distribution_is_that_of_float64(logits: np.ndarray) -> None:
    actual = _log_distribution(
        jnp.asarray(logits),
        Sampling.of(CONFIGS, vocab_size=VOCAB),
        vocab_size=VOCAB,
        allowed=ALLOWED,
        history=history_of(len(CONFIGS)),
    )
    assert actual.dtype == jnp.float32
    for row, config in enumerate(CONFIGS):
        expected = exact(logits[row], config)
        with np.errstate(divide="ignore"):
            # Scores are below 32, and each of about eight operations rounds once.
            np.testing.assert_allclose(
                actual[row], np.log(expected), rtol=0, atol=8 * 32 * 2.0**-24, err_msg=f"{config}"
            )
        assert 1 <= (expected > 0).sum() <= VOCAB - 1


def test_draws_follow_the_distribution(logits: np.ndarray) -> None:
    draws = 2000
    settings = Sampling.of(CONFIGS, vocab_size=VOCAB)
    options = {"vocab_size": VOCAB, "allowed": ALLOWED, "history": history_of(len(CONFIGS))}
    counts = np.zeros((len(CONFIGS), VOCAB))

    @jax.jit
    def many(first: jax.Array) -> jax.Array:
        def one(position: jax.Array) -> jax.Array:
            keys = row_keys(jnp.arange(len(CONFIGS)), jnp.full(len(CONFIGS), position))
            return sample(jnp.asarray(logits), keys, settings, **options)

        return jax.lax.map(one, first + jnp.arange(draws))

    for row, tokens in enumerate(np.asarray(many(jnp.asarray(0))).T):
        counts[row] = np.bincount(tokens, minlength=VOCAB)
    for row, config in enumerate(CONFIGS):
        expected = draws * exact(logits[row], config)
        assert (counts[row][expected == 0] == 0).all(), config
        # Rare tokens are counted together, so that each class has some draws.
        rare = expected < 5
        seen = np.append(counts[row][~rare], counts[row][rare].sum())
        due = np.append(expected[~rare], expected[rare].sum())
        statistic = ((seen - due)[due > 0] ** 2 / due[due > 0]).sum()
        # Chi-square with f degrees of freedom: mean f, variance 2 f.
        freedom = max((due > 0).sum() - 1, 1)
        assert statistic <= freedom + 5 * (2 * freedom) ** 0.5, config


def test_rows_without_penalties_are_not_touched(logits: np.ndarray) -> None:
    plain = _log_distribution(jnp.asarray(logits[:1]), Sampling.of([SamplingConfig()]), vocab_size=VOCAB)
    settings = Sampling.of([SamplingConfig(), SamplingConfig(repetition_penalty=2.0, presence_penalty=1.0)])
    both = _log_distribution(jnp.asarray(logits[:2]), settings, vocab_size=VOCAB, history=history_of(2))
    np.testing.assert_array_equal(both[0], plain[0])


def test_rows_without_a_token_to_draw_have_no_distribution() -> None:
    rows = jnp.asarray([[0, jnp.nan], [-jnp.inf, -jnp.inf], [0, jnp.inf], [0, -jnp.inf]])
    for config in (SamplingConfig(), SamplingConfig(temperature=0.0)):
        actual = log_distribution(rows, config, vocab_size=2)
        np.testing.assert_array_equal(actual, [[np.nan] * 2] * 3 + [[0, -np.inf]])


def test_penalties_need_the_tokens_so_far() -> None:
    with pytest.raises(InputError, match="give their history"):
        sample(jnp.zeros((1, 4)), jax.random.key(0), SamplingConfig(presence_penalty=0.5), vocab_size=4)
