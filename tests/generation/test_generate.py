"""Generation is the model's own continuation, drawn in one compiled loop."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import MeshConfig
from mamba_jax.data.tokenizer import ByteTokenizer
from mamba_jax.errors import InputError
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.text import complete
from mamba_jax.models import parameters
from mamba_jax.sharding import make_mesh
from tests.generation.conftest import CONFIG

GREEDY = SamplingConfig(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return parameters.define(CONFIG), parameters.init(CONFIG, jax.random.key(0))


@pytest.fixture
def prompt() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (3, 5), 0, CONFIG.vocab_size)


def test_greedy_takes_the_likeliest_token_of_the_full_forward_pass(model, prompt: jax.Array) -> None:
    definition, params = model
    added = generate(definition, params, prompt, num_tokens=8, key=jax.random.key(0), sampling=GREEDY)
    assert added.shape == (3, 8)
    sequence = jnp.concatenate([prompt, added], axis=1)
    logits = definition.merge(params)(sequence).logits[:, 4:-1, : CONFIG.vocab_size]
    np.testing.assert_array_equal(added, jnp.argmax(logits, axis=-1))
    assert len(np.unique(added)) > 4, "a model that repeats itself could do so without its state"


def test_penalties_count_prompt_and_continuation_of_each_row(model, prompt: jax.Array) -> None:
    definition, params = model
    # Far above all logits: no token of the continuation comes again, and those of the prompt only if they are likely.
    sampling = SamplingConfig(temperature=0.0, presence_penalty=1e4, repetition_penalty=2.0, logit_bias=((3, -np.inf),))
    lengths, key = np.asarray([5, 2, 4]), jax.random.key(0)
    added = generate(definition, params, prompt, lengths=lengths, num_tokens=8, key=key, sampling=sampling)
    texts = np.zeros((3, 13), np.int32)
    for row, length in enumerate([5, 2, 4]):
        texts[row, : length + 8] = [*prompt[row, :length], *added[row]]
    logits = np.array(definition.merge(params)(jnp.asarray(texts)).logits[..., : CONFIG.vocab_size])
    logits[..., 3] = -np.inf
    for row, length in enumerate([5, 2, 4]):
        for position in range(length, length + 8):
            scores, seen = logits[row, position - 1], np.unique(texts[row, :position])
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / 2, scores[seen] * 2)
            scores[texts[row, length:position]] -= 1e4
            assert texts[row, position] == scores.argmax()


def test_samples_depend_on_the_key_alone(model, prompt: jax.Array) -> None:
    definition, params = model
    first, again, other = (
        generate(definition, params, prompt, num_tokens=20, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({tuple(np.asarray(row)) for row in first}) == 3, "rows must not share their randomness"


def test_one_prompt_on_many_devices_is_continued_as_on_one(model, prompt: jax.Array) -> None:
    definition, params = model
    alone = generate(definition, params, prompt[:1], num_tokens=6, key=jax.random.key(0), sampling=GREEDY)
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        split = generate(definition, params, prompt[:1], num_tokens=6, key=jax.random.key(0), sampling=GREEDY)
    np.testing.assert_array_equal(split, alone)


def test_padding_is_never_sampled(model, prompt: jax.Array) -> None:
    definition, params = model
    # A flat distribution over all 32 rows: 120 draws would miss the 3 padded ones with probability 1e-5.
    flat = {**params, "lm_head": {"table": jnp.zeros_like(params["lm_head"]["table"])}}
    tokens = generate(definition, flat, prompt, num_tokens=40, key=jax.random.key(0))
    assert definition.config.padded_vocab_size == 32
    assert tokens.min() >= 0
    assert tokens.max() < 29


@pytest.mark.parametrize("length", [29, 20, 64])
def test_ids_that_are_not_allowed_are_never_sampled(model, prompt: jax.Array, length: int) -> None:
    definition, params = model
    flat = {**params, "lm_head": {"table": jnp.zeros_like(params["lm_head"]["table"])}}
    allowed = np.arange(length) % 2 == 1
    # 120 draws from at most 15 ids miss one of them with probability 15 * (14 / 15)^120 < 0.004.
    tokens = generate(definition, flat, prompt, num_tokens=40, key=jax.random.key(0), allowed=allowed)
    assert set(np.unique(tokens)) == set(range(1, min(length, 29), 2))


def test_logits_that_are_no_numbers_are_refused(model, prompt: jax.Array) -> None:
    definition, params = model
    for value in (jnp.nan, jnp.inf):
        damaged = {**params, "lm_head": {"table": params["lm_head"]["table"].at[7].set(value)}}
        with pytest.raises(InputError, match="logits are not finite"):
            generate(definition, damaged, prompt, num_tokens=8, key=jax.random.key(0), sampling=GREEDY)
    with pytest.raises(InputError, match="none of the model's ids 0 to 28 may be drawn"):
        generate(definition, params, prompt, num_tokens=8, key=jax.random.key(0), allowed=np.arange(40) > 28)


def test_all_tokens_come_from_one_program(model, prompt: jax.Array, caplog: pytest.LogCaptureFixture) -> None:
    definition, params = model
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for seed in (0, 1):
            generate(definition, params, prompt, num_tokens=11, key=jax.random.key(seed))
    compiled = [record.getMessage() for record in caplog.records if "Compiling jit(_generate)" in record.getMessage()]
    assert len(compiled) == 1, compiled


@pytest.mark.parametrize(
    ("shape", "num_tokens", "token", "message"),
    [((1, 0), 4, 0, "no tokens"), ((1, 2), 0, 0, "got 0"), ((1, 2), 4, 29, "id 29"), ((1, 2), 4, -1, "id -1")],
)
def test_bad_requests_are_refused(model, shape: tuple[int, int], num_tokens: int, token: int, message: str) -> None:
    definition, params = model
    with pytest.raises(InputError, match=message):
        generate(definition, params, jnp.full(shape, token), num_tokens=num_tokens, key=jax.random.key(0))


def test_text_ends_with_the_document() -> None:
    config = dataclasses.replace(CONFIG, vocab_size=257)
    params = parameters.init(config, jax.random.key(0))
    tokenizer = ByteTokenizer()

    def write(params) -> str:
        return complete(
            parameters.define(config), params, tokenizer, "ab", num_tokens=6, key=jax.random.key(0), sampling=GREEDY
        )

    assert write(params).startswith("ab")
    hidden = parameters.define(config).merge(params).hidden(jnp.asarray([[97, 98]])).hidden[0, -1]
    table = params["lm_head"]["table"].at[256].set(100 * hidden)
    assert write({**params, "lm_head": {"table": table}}) == "ab"
