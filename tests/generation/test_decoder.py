"""A decoder reads padded prompts as if each were alone, and one program serves every setting."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import Mamba1Config, ModelConfig
from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder
from mamba_jax.generation.generate import generate
from mamba_jax.generation.sampling import Sampling, SamplingConfig
from mamba_jax.models import parameters

GREEDY = SamplingConfig(temperature=0.0)
LENGTHS = np.array([1, 9, 2, 6])
# Logits of order 1 are sums of float32 products, in another order where a row is padded: some ten roundings.
ROUNDING = 16 * 2.0**-24


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = ModelConfig(
        vocab_size=29,
        d_model=16,
        num_layers=2,
        mixer=Mamba1Config(state_dim=4),
        embedding_std=1.0,
        tie_embeddings=False,
        compute_dtype="float32",
    )
    return Decoder(parameters.define(config), jax.jit(parameters.init, static_argnums=0)(config, jax.random.key(0)))


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 29, (4, 9), dtype=np.int32)


def test_every_prompt_is_read_as_if_it_were_alone(decoder: Decoder, prompts: np.ndarray) -> None:
    together = decoder.prefill(prompts, LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone = decoder.prefill(prompts[row : row + 1, :length])
        np.testing.assert_allclose(together.logits[row], alone.logits[0], rtol=ROUNDING, atol=ROUNDING)
        jax.tree.map(
            lambda ours, theirs, row=row: np.testing.assert_allclose(
                ours[:, row], theirs[:, 0], rtol=ROUNDING, atol=ROUNDING
            ),
            together.state,
            alone.state,
        )


def test_padding_changes_nothing(decoder: Decoder, prompts: np.ndarray) -> None:
    other = np.where(np.arange(9) < LENGTHS[:, None], prompts, 28 - prompts)
    jax.tree.map(np.testing.assert_array_equal, decoder.prefill(prompts, LENGTHS), decoder.prefill(other, LENGTHS))


def test_prompts_of_different_lengths_are_continued_as_alone(decoder: Decoder, prompts: np.ndarray) -> None:
    definition, params = decoder.definition, decoder.params
    options = {"num_tokens": 7, "key": jax.random.key(0), "sampling": GREEDY}
    together = generate(definition, params, jnp.asarray(prompts), lengths=LENGTHS, **options)
    for row, length in enumerate(LENGTHS):
        alone = generate(definition, params, jnp.asarray(prompts[row : row + 1, :length]), **options)
        np.testing.assert_array_equal(together[row], alone[0])


def test_steps_write_what_generate_writes(decoder: Decoder, prompts: np.ndarray) -> None:
    written = generate(
        decoder.definition,
        decoder.params,
        jnp.asarray(prompts),
        num_tokens=6,
        key=jax.random.key(5),
        sampling=SamplingConfig(temperature=0.8, top_k=9),
    )
    sampling = Sampling.of([SamplingConfig(temperature=0.8, top_k=9)] * 4)
    keys = jax.random.split(jax.random.key(5), 6)
    read = decoder.prefill(prompts)
    tokens, state = [decoder.draw(read.logits, sampling, keys[0])], read.state
    for key in keys[1:]:
        step = decoder.step(state, tokens[-1], sampling, key)
        tokens, state = [*tokens, step.tokens], step.state
    np.testing.assert_array_equal(np.stack(tokens, axis=1), written)


def test_every_row_has_its_own_setting(decoder: Decoder) -> None:
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1])), (3000, 4))
    settings = [GREEDY, SamplingConfig(top_k=2), SamplingConfig(top_p=0.65), SamplingConfig()]
    sampling = Sampling.of(settings * 750)
    drawn = np.asarray(
        decoder.draw(jnp.pad(logits, ((0, 0), (0, 28)), constant_values=-jnp.inf), sampling, jax.random.key(0))
    )
    assert [set(drawn[row::4]) for row in range(4)] == [{0}, {0, 1}, {0, 1}, {0, 1, 2, 3}]


def test_no_setting_compiles_anew(decoder: Decoder, prompts: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    def write(setting: SamplingConfig, lengths: np.ndarray) -> None:
        read = decoder.prefill(prompts, lengths)
        token = decoder.draw(read.logits, Sampling.of([setting] * 4), jax.random.key(0))
        decoder.step(read.state, token, Sampling.of([setting] * 4), jax.random.key(1))
        generate(
            decoder.definition,
            decoder.params,
            jnp.asarray(prompts),
            lengths=lengths,
            num_tokens=3,
            key=jax.random.key(0),
            sampling=setting,
        )

    write(GREEDY, LENGTHS)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for setting in (SamplingConfig(temperature=0.3), SamplingConfig(top_k=3), SamplingConfig(top_p=0.5)):
            write(setting, LENGTHS[::-1].copy())
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert not compiled


@pytest.mark.parametrize("length", [0, 10, -1])
def test_lengths_outside_of_the_rows_are_refused(decoder: Decoder, prompts: np.ndarray, length: int) -> None:
    with pytest.raises(InputError, match=f"a prompt has {length} tokens, but rows hold 1 to 9"):
        decoder.prefill(prompts, np.array([1, length, 2, 3]))
