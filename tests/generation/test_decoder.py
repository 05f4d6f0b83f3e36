"""A decoder reads padded prompts as if each were alone, and one program serves every setting."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import Mamba1Config
from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder
from mamba_jax.generation.generate import generate
from mamba_jax.generation.penalties import History
from mamba_jax.generation.sampling import Sampling, SamplingConfig, row_keys, sample
from mamba_jax.models import parameters

GREEDY = SamplingConfig(temperature=0.0)
LENGTHS = np.array([1, 9, 2, 6])
# Logits of order 1 are sums of float32 products, in another order where a row is padded: some ten roundings.
ROUNDING = 16 * 2.0**-24


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
                ours[row], theirs[0], rtol=ROUNDING, atol=ROUNDING
            ),
            together.state,
            alone.state,
        )


def test_padding_changes_nothing(decoder: Decoder, prompts: np.ndarray) -> None:
    other = np.where(np.arange(9) < LENGTHS[:, None], prompts, 28 - prompts)
    jax.tree.map(np.testing.assert_array_equal, decoder.prefill(prompts, LENGTHS), decoder.prefill(other, LENGTHS))


@pytest.mark.parametrize("part_length", [1, 4, 8])
def test_parts_give_what_the_whole_prompt_gives(decoder: Decoder, prompts: np.ndarray, part_length: int) -> None:
    whole = decoder.prefill(prompts, LENGTHS)
    in_parts = Decoder(decoder.definition, decoder.params, part_length=part_length).prefill(prompts, LENGTHS)
    close = functools.partial(np.testing.assert_allclose, rtol=ROUNDING, atol=ROUNDING)
    jax.tree.map(close, in_parts, whole)


def test_a_state_is_extended_and_stays_what_it_was(decoder: Decoder, prompts: np.ndarray) -> None:
    whole, begun = decoder.prefill(prompts), decoder.prefill(prompts[:, :2])
    before = jax.tree.map(np.array, begun.state)
    extended, logits = decoder.extend(begun.state, prompts[:, 2:]), decoder.verify(begun.state, prompts[:, 2:])
    close = functools.partial(np.testing.assert_allclose, rtol=ROUNDING, atol=ROUNDING)
    jax.tree.map(close, extended, whole)
    close(logits[:, -1], whole.logits)
    jax.tree.map(np.testing.assert_array_equal, begun.state, before)


def test_a_block_may_read_a_token_by_one_operation(decoder: Decoder, prompts: np.ndarray) -> None:
    mixer = Mamba1Config(state_dim=4, step_implementation="xla")
    definition = parameters.define(dataclasses.replace(decoder.definition.config, mixer=mixer))
    read = decoder.prefill(prompts)
    program = jax.jit(lambda params, token, state: definition.merge(params)(token, state))
    lowered = program.lower(decoder.params, prompts[:, :1], read.state).as_text(debug_info=True)
    assert lowered.count("mamba1_step.xla") > 0
    found = program(decoder.params, prompts[:, :1], read.state)
    expected = decoder.extend(read.state, prompts[:, :1])
    close = functools.partial(np.testing.assert_allclose, rtol=ROUNDING, atol=ROUNDING)
    jax.tree.map(close, (found.logits[:, 0], found.state), (expected.logits, expected.state))


def test_a_rounded_state_stays_rounded(decoder: Decoder, prompts: np.ndarray) -> None:
    rounding = Decoder(decoder.definition, decoder.params, state_dtype="bfloat16")
    read, exact = rounding.prefill(prompts), decoder.prefill(prompts)
    step = rounding.step(read.state, prompts[:, 0], Sampling.of([GREEDY] * 4), jax.random.key(0))
    assert {array.dtype.name for array in jax.tree.leaves((read.state, step.state))} == {"bfloat16"}
    np.testing.assert_array_equal(read.logits, exact.logits)
    expected = decoder.step(exact.state, prompts[:, 0], Sampling.of([GREEDY] * 4), jax.random.key(0))
    # A state off by 2^-9 of itself moves logits of order 1 by about as much.
    np.testing.assert_allclose(step.logits, expected.logits, rtol=2.0**-7, atol=2.0**-7)
    assert np.abs(step.logits - expected.logits).max() > ROUNDING


def test_prompts_of_different_lengths_are_continued_as_alone(decoder: Decoder, prompts: np.ndarray) -> None:
    definition, params = decoder.definition, decoder.params
    options = {"num_tokens": 7, "key": jax.random.key(0), "sampling": GREEDY}
    together = generate(definition, params, jnp.asarray(prompts), lengths=LENGTHS, **options)
    for row, length in enumerate(LENGTHS):
        alone = generate(definition, params, jnp.asarray(prompts[row : row + 1, :length]), **options)
        np.testing.assert_array_equal(together[row], alone[0])


def test_steps_write_what_generate_writes(decoder: Decoder, prompts: np.ndarray) -> None:
    key, setting = jax.random.key(5), SamplingConfig(temperature=0.8, top_k=9, presence_penalty=0.5)
    written = generate(
        decoder.definition, decoder.params, jnp.asarray(prompts), num_tokens=6, key=key, sampling=setting
    )
    sampling, history = Sampling.of([setting] * 4), History.of(prompts, vocab_size=29)
    seeds = np.asarray([jax.random.bits(jax.random.fold_in(key, row)) for row in range(4)])
    read, tokens = decoder.prefill(prompts), []
    for position in range(6):
        keys = row_keys(seeds, np.full(4, position))
        tokens.append(sample(read.logits, keys, sampling, vocab_size=29, history=history))
        read, history = decoder.extend(read.state, tokens[-1][:, None]), history.added(tokens[-1])
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
