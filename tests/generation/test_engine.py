"""An engine gives every request the text that it would get alone, and compiles nothing for the next one."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder
from mamba_jax.generation.engine import Engine, Progress, Request
from mamba_jax.generation.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0)
SETTINGS = (GREEDY, SamplingConfig(top_k=5), SamplingConfig(presence_penalty=0.5), SamplingConfig(temperature=0.7))
END = 3


@pytest.fixture(scope="module")
def in_parts(decoder: Decoder) -> Decoder:
    return Decoder(decoder.definition, decoder.params, part_length=32)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            tokens=rng.integers(0, 29, rng.integers(1, 70)).tolist(),
            num_tokens=int(rng.integers(1, 20)),
            sampling=SETTINGS[number % 4],
            seed=number,
        )
        for number in range(24)
    ]


def texts(engine: Engine, requests: list[Request]) -> dict[int, list[Progress]]:
    found: dict[int, list[Progress]] = {}
    for progress in engine.run(requests):
        found.setdefault(progress.request, []).append(progress)
    return found


def tokens(parts: list[Progress]) -> list[int]:
    return [token for part in parts for token in part.tokens]


@pytest.fixture(scope="module")
def together(in_parts: Decoder, requests: list[Request]) -> dict[int, list[Progress]]:
    return texts(Engine(in_parts, rows=4, end=END), requests)


def test_every_text_is_that_of_its_request_alone(
    in_parts: Decoder, requests: list[Request], together: dict[int, list[Progress]]
) -> None:
    assert sorted(together) == list(range(len(requests)))
    engine = Engine(in_parts, rows=4, end=END)
    for number, request in enumerate(requests):
        alone = [progress for progress in engine.run([request])]
        assert tokens(alone) == tokens(together[number]), number
        assert [p for part in alone for p in part.log_probabilities] == [
            p for part in together[number] for p in part.log_probabilities
        ]


def test_a_text_ends_where_it_should(requests: list[Request], together: dict[int, list[Progress]]) -> None:
    reasons = set()
    for number, request in enumerate(requests):
        drawn = tokens(together[number])
        *before, last = together[number]
        assert all(part.finished is None for part in before)
        assert last.finished == ("end" if drawn[-1] == END else "length")
        assert END not in drawn[:-1]
        assert len(drawn) <= request.num_tokens
        assert last.finished == "end" or len(drawn) == request.num_tokens
        reasons.add(last.finished)
    assert reasons == {"end", "length"}


def test_tokens_and_their_probabilities_are_those_of_the_full_forward_pass(
    in_parts: Decoder, requests: list[Request], together: dict[int, list[Progress]]
) -> None:
    model = in_parts.definition.merge(in_parts.params)
    for number in range(0, len(requests), 4):
        drawn = tokens(together[number])
        ids = [*requests[number].tokens, *drawn]
        padded = np.pad(ids, (0, 96 - len(ids)))[None].astype(np.int32)
        logits = jax.jit(lambda ids: model(ids).logits)(padded)[0, len(ids) - len(drawn) - 1 : len(ids) - 1, :29]
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), drawn)
        expected = jax.nn.log_softmax(logits, axis=-1)[np.arange(len(drawn)), drawn]
        found = np.concatenate([part.log_probabilities for part in together[number]])
        # Logits up to about 10 are sums of some ten float32 products, in another order.
        np.testing.assert_allclose(found, expected, rtol=0, atol=10 * 32 * 2.0**-24)


def test_nothing_is_compiled_for_other_prompts(
    in_parts: Decoder, requests: list[Request], together: dict[int, list[Progress]], caplog: pytest.LogCaptureFixture
) -> None:
    del together
    engine = Engine(in_parts, rows=4, end=END)
    others = [dataclasses.replace(r, seed=r.seed + 100, tokens=[*r.tokens[1:], r.tokens[0]]) for r in requests]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        texts(engine, others[::-1])
    assert not [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]


def test_prompts_are_padded_to_few_lengths(in_parts: Decoder) -> None:
    engine = Engine(Decoder(in_parts.definition, in_parts.params, part_length=64, max_length=150), rows=1)
    lengths = {1: 16, 16: 16, 17: 24, 24: 24, 25: 32, 33: 48, 48: 48, 49: 64, 64: 64, 65: 128, 129: 150}
    assert {length: engine.padded_length(length) for length in lengths} == lengths


def test_a_request_goes_on_from_a_state(in_parts: Decoder) -> None:
    rng = np.random.default_rng(1)
    before, after = rng.integers(0, 29, 11).tolist(), rng.integers(0, 29, 5).tolist()
    read = in_parts.prefill(np.asarray([before], np.int32))
    engine = Engine(in_parts, rows=2)
    for rest in (after, []):
        whole = Request(tokens=[*before, *rest], num_tokens=6, sampling=GREEDY)
        resumed = Request(tokens=rest, num_tokens=6, sampling=GREEDY, start=read, history=before)
        assert tokens(list(engine.run([resumed]))) == tokens(list(engine.run([whole])))


def test_a_cancelled_request_has_no_more_progress(in_parts: Decoder) -> None:
    engine = Engine(in_parts, rows=1, prompts_per_call=4)
    # All three are read together; the second and the third wait for the row.
    first, second, third = (engine.submit(Request(tokens=[1, 2], num_tokens=40, sampling=GREEDY)) for _ in range(3))
    engine.step()
    engine.cancel(first)
    engine.cancel(third)
    found = [progress for _ in range(20) for progress in engine.step()]
    assert {progress.request for progress in found} == {second}
    assert len(tokens(found)) == 40
    assert engine.is_idle


def test_prompts_are_read_in_full_groups_whenever_rows_get_free(
    in_parts: Decoder, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of other lengths free one row at a time; a group of one prompt would take as long as one of four."""
    groups = []
    prefill = Decoder.prefill
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, ids, lengths: (groups.append(lengths), prefill(self, ids, lengths))[1]
    )
    alike = [dataclasses.replace(request, tokens=request.tokens[:1]) for request in requests]
    assert len(texts(Engine(in_parts, rows=4, end=END), alike)) == len(alike)
    assert len(groups) == len(alike) // 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "the prompt has no tokens"),
        ({"tokens": [1, 29]}, "token id 29, but the model's ids are 0 to 28"),
        ({"num_tokens": 0}, "number of tokens to generate must be positive, got 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"sampling": SamplingConfig(logit_bias=((40, 1.0),))}, "logit_bias has the token id 40"),
        ({"num_tokens": 60}, "would have 61 tokens, but max_length is 50"),
    ],
)
def test_what_cannot_be_continued_is_refused_and_disturbs_nothing(
    decoder: Decoder, changes: dict[str, Any], message: str
) -> None:
    engine = Engine(Decoder(decoder.definition, decoder.params, max_length=50), rows=2)
    good = Request(tokens=[1], num_tokens=3)
    number = engine.submit(good)
    with pytest.raises(InputError, match=message):
        engine.submit(dataclasses.replace(good, **changes))
    found = [progress for _ in range(3) for progress in engine.step()]
    assert [(progress.request, progress.finished) for progress in found] == [(number, "length")]


def test_logits_that_are_not_finite_end_in_one_line(decoder: Decoder) -> None:
    broken = jax.tree.map(lambda leaf: leaf * np.nan, decoder.params)
    engine = Engine(Decoder(decoder.definition, broken), rows=2)
    with pytest.raises(InputError, match="logits are not finite"):
        list(engine.run([Request(tokens=[1], num_tokens=3)]))


@pytest.mark.parametrize("changes", [{"rows": 0}, {"steps_per_call": 0}, {"prompts_per_call": -1}])
def test_an_engine_of_nothing_is_refused(decoder: Decoder, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be positive"):
        Engine(decoder, rows=changes.pop("rows", 2), **changes)
