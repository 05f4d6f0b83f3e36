"""A draft changes how fast a text comes, and neither the text nor its distribution."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import AttentionConfig, Mamba1Config, Mamba2Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder, Prefilled
from mamba_jax.generation.engine import Progress, Request
from mamba_jax.generation.penalties import History
from mamba_jax.generation.sampling import SamplingConfig, log_distribution
from mamba_jax.generation.speculative import SpeculativeDecoder
from mamba_jax.models import parameters
from mamba_jax.models.config import Hybrid

VOCAB = 9
GREEDY = SamplingConfig(temperature=0.0)
SMALL = ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=1,
    mixer=Mamba1Config(state_dim=4),
    embedding_std=1.0,
    tie_embeddings=False,
    compute_dtype="float32",
)
HYBRID = dataclasses.replace(
    SMALL,
    num_layers=2,
    mixer=Hybrid.of_pattern("AM", A=AttentionConfig(num_heads=2), M=Mamba2Config(state_dim=4, head_dim=8)),
)
PROMPTS = [[1, 5, 2], [7], [3, 3, 8, 0, 4, 1]]


def _decoder(config: ModelConfig, seed: int, **options: Any) -> Decoder:
    params = jax.jit(parameters.init, static_argnums=0)(config, jax.random.key(seed))
    return Decoder(parameters.define(config), params, **options)


@pytest.fixture(scope="module")
def target() -> Decoder:
    return _decoder(SMALL, 0)


@pytest.fixture(scope="module")
def pair(target: Decoder) -> SpeculativeDecoder:
    """A target, and a draft whose tables of ids are nearly the same and whose layer is not."""
    other = _decoder(SMALL, 1).params
    mixed = jax.tree.map(lambda ours, theirs: 0.6 * ours + 0.4 * theirs, target.params, other)
    return SpeculativeDecoder(target, Decoder(target.definition, mixed), num_proposals=3, block=4)


def _texts(decoder: SpeculativeDecoder, requests: list[Request], **options: Any) -> list[list[Progress]]:
    """What came to each request."""
    found: list[list[Progress]] = [[] for _ in requests]
    for progress in decoder.continue_rows(requests, **options):
        for part in progress:
            found[part.request].append(part)
    return found


def _tokens(parts: list[Progress]) -> list[int]:
    return [token for part in parts for token in part.tokens]


def test_greedy_text_is_that_of_the_target(pair: SpeculativeDecoder, target: Decoder) -> None:
    requests = [
        Request(tokens=prompt, num_tokens=count, sampling=dataclasses.replace(GREEDY, frequency_penalty=penalty))
        for prompt, count, penalty in zip(PROMPTS, (23, 1, 30), (0.0, 0.0, 0.3), strict=True)
    ]
    before, found = pair.statistics, _texts(pair, requests)
    for request, parts in zip(requests, found, strict=True):
        text = _tokens(parts)
        expected, log_p = _likeliest(target, request, text)
        assert text == expected
        assert len(text) == request.num_tokens
        assert [part.finished for part in parts] == [None] * (len(parts) - 1) + ["length"]
        # Sums of float32 products in another order: some ten roundings of numbers of order 1.
        ours = [p for part in parts for p in part.log_probabilities]
        np.testing.assert_allclose(ours, log_p, rtol=0, atol=2.0**-19)
    assert len({len(part.tokens) for parts in found for part in parts[1:-1]}) > 1, "rows of different acceptance"
    proposals = pair.statistics.proposals - before.proposals
    accepted = pair.statistics.accepted - before.accepted
    assert 0 < accepted < proposals == 3 * (pair.statistics.rounds - before.rounds)


def _likeliest(decoder: Decoder, request: Request, text: list[int]) -> tuple[list[int], np.ndarray]:
    """The likeliest token at every place of a text behind its prompt, and the log-probabilities of the text's own."""
    prompt = [*request.history, *request.tokens]
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(prompt) + len(text)] = prompt + text
    logits = np.asarray(decoder.verify(decoder.start(1), padded)[0, len(prompt) - 1 :, :VOCAB], np.float64)
    logits = logits[: len(text)]
    counts = np.cumsum(np.eye(VOCAB)[text], axis=0) - np.eye(VOCAB)[text]
    likeliest = np.argmax(logits - request.sampling.frequency_penalty * counts, axis=1)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return likeliest.tolist(), log_p[np.arange(len(text)), text]


def test_a_text_ends_with_its_document(pair: SpeculativeDecoder) -> None:
    request = Request(tokens=PROMPTS[0], num_tokens=40, sampling=SamplingConfig(), seed=3)
    whole = _tokens(_texts(pair, [request])[0])
    end = whole[7]
    parts = _texts(pair, [request], end=end)[0]
    assert _tokens(parts) == whole[: whole.index(end) + 1]
    assert parts[-1].finished == "end"


def test_a_text_does_not_depend_on_other_rows(pair: SpeculativeDecoder) -> None:
    requests = [Request(tokens=prompt, num_tokens=17, seed=row) for row, prompt in enumerate(PROMPTS)]
    together = _texts(pair, requests)
    assert _tokens(together[1]) == _tokens(_texts(pair, [requests[1]])[0])
    assert _tokens(together[1]) != _tokens(_texts(pair, [dataclasses.replace(requests[1], seed=5)])[0])


def test_a_draft_that_is_the_target_is_always_right(target: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    same = SpeculativeDecoder(target, target, num_proposals=3, block=5)
    # The first token and 4 a round, so that no round is cut short.
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        _texts(same, [Request(tokens=prompt, num_tokens=25, seed=row) for row, prompt in enumerate(PROMPTS)])
    assert same.statistics.acceptance == 1.0
    assert same.statistics.tokens == 4 * same.statistics.rounds == 72
    compiled = [record.getMessage() for record in caplog.records if "Compiling jit(run_round)" in record.getMessage()]
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        pytest.param(
            SamplingConfig(temperature=0.8, top_k=6, repetition_penalty=1.5, frequency_penalty=0.7),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "penalties"],
)
def test_tokens_have_the_distribution_of_the_target(
    pair: SpeculativeDecoder, target: Decoder, sampling: SamplingConfig
) -> None:
    rows, prompt = 4000, PROMPTS[0]
    requests = [Request(tokens=prompt, num_tokens=4, seed=seed, sampling=sampling) for seed in range(rows)]
    before, drawn = pair.statistics, np.asarray([_tokens(parts) for parts in _texts(pair, requests)])
    accepted = pair.statistics.accepted - before.accepted
    assert 0.2 < accepted / (pair.statistics.proposals - before.proposals) < 0.9
    log_p = _exact(target, prompt, sampling)
    for names, axes in (("first two", (2, 3)), ("second and third", (0, 3)), ("last two", (0, 1))):
        kept = [axis for axis in range(4) if axis not in axes]
        expected = rows * np.exp(log_p).sum(axis=axes).reshape(-1)
        codes = drawn[:, kept[0]] * VOCAB + drawn[:, kept[1]]
        counts = np.bincount(codes, minlength=VOCAB * VOCAB)
        assert counts[expected == 0].sum() == 0, names
        _check_counts(counts, expected, names)


def _exact(target: Decoder, prompt: list[int], sampling: SamplingConfig) -> np.ndarray:
    """The log-probabilities of all texts of four tokens, (V, V, V, V), by reading every text of three."""
    threes = np.stack(np.meshgrid(*[np.arange(VOCAB)] * 3, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int32)
    read = target.prefill(np.asarray([prompt], np.int32))
    state = jax.tree.map(lambda array: jnp.repeat(array, len(threes), axis=0), read.state)
    logits = [jnp.repeat(read.logits, len(threes), axis=0), *jnp.moveaxis(target.verify(state, threes), 1, 0)]
    history = History.of(np.tile(np.asarray(prompt, np.int32), (len(threes), 1)), vocab_size=VOCAB)
    total = np.zeros(len(threes))
    for index in range(4):
        log_p = np.asarray(log_distribution(logits[index], sampling, vocab_size=VOCAB, history=history), np.float64)
        if index == 3:
            return (total[:, None] + log_p).reshape(VOCAB, VOCAB, VOCAB, VOCAB)
        total = total + log_p[np.arange(len(threes)), threes[:, index]]
        history = history.added(jnp.asarray(threes[:, index]))
    raise AssertionError


def _check_counts(counts: np.ndarray, expected: np.ndarray, names: str) -> None:
    """Pearson's test, with rare outcomes as one; the limit is five deviations above the mean of chi-square."""
    is_rare = expected < 8
    pooled = [np.append(x[~is_rare], x[is_rare].sum()) for x in (counts, expected)]
    degrees = len(pooled[0]) - 1
    statistic = ((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[1], 1)).sum()
    assert degrees > 15
    assert statistic < degrees + 5 * np.sqrt(2 * degrees), (names, statistic, degrees)


@pytest.mark.slow
def test_a_model_with_attention_goes_on_from_a_start() -> None:
    large = _decoder(HYBRID, 2, max_length=40)
    decoder = SpeculativeDecoder(large, _decoder(SMALL, 3), num_proposals=2, block=4)
    read = large.prefill(np.asarray([PROMPTS[2]], np.int32))
    start = Prefilled(logits=read.logits, state=read.state)
    requests = [
        Request(tokens=[], num_tokens=34, sampling=GREEDY, start=start, history=PROMPTS[2]),
        Request(tokens=[5, 6], num_tokens=20, sampling=GREEDY, start=start, history=PROMPTS[2]),
        Request(tokens=PROMPTS[2], num_tokens=34, sampling=GREEDY),
    ]
    found = [_tokens(parts) for parts in _texts(decoder, requests)]
    for request, text in zip(requests, found, strict=True):
        assert text == _likeliest(large, request, text)[0]
    assert found[0] == found[2]


def test_what_cannot_be_is_refused(pair: SpeculativeDecoder, target: Decoder) -> None:
    assert list(pair.continue_rows([])) == []
    other = _decoder(dataclasses.replace(SMALL, vocab_size=10), 0)
    with pytest.raises(InputError, match=r"the draft has 10 ids but the model 9: take a draft"):
        SpeculativeDecoder(target, other)
    with pytest.raises(InputError, match=r"number of proposals must be positive, got 0"):
        SpeculativeDecoder(target, target, num_proposals=0)
    with pytest.raises(InputError, match=r"a round may add 5 tokens, but a block has 4"):
        SpeculativeDecoder(target, target, num_proposals=4, block=4)
    target.prefill(np.ones((1, 1), np.int32))
    requests = {
        r"the prompt has no tokens": Request(tokens=[], num_tokens=3),
        r"the token id 9, but": Request(tokens=[9], num_tokens=3),
        r"give its ids as the request's history": Request(
            tokens=[1], num_tokens=3, start=target.prefill(np.ones((1, 1), np.int32))
        ),
    }
    for message, request in requests.items():
        with pytest.raises(InputError, match=message):
            next(pair.continue_rows([request]))
    damaged = jax.tree.map(lambda array: array * np.nan, target.params)
    broken = SpeculativeDecoder(Decoder(target.definition, damaged), target, num_proposals=3, block=4)
    with pytest.raises(InputError, match=r"logits are not finite"):
        next(broken.continue_rows([Request(tokens=[1], num_tokens=3)]))


def test_a_draft_that_fails_costs_time_only(pair: SpeculativeDecoder, target: Decoder) -> None:
    damaged = jax.tree.map(lambda array: array * np.nan, target.params)
    broken = SpeculativeDecoder(target, Decoder(target.definition, damaged), num_proposals=3, block=4)
    requests = [Request(tokens=prompt, num_tokens=9, sampling=GREEDY) for prompt in PROMPTS]
    found = [_tokens(parts) for parts in _texts(broken, requests)]
    assert found == [_tokens(parts) for parts in _texts(pair, requests)]
    assert broken.statistics.accepted == 0
