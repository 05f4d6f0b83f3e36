"""Beam search finds what trying every continuation finds, where its beams are enough."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.errors import InputError
from mamba_jax.generation.beam_search import beam_search
from mamba_jax.generation.decoder import Decoder
from mamba_jax.generation.engine import Engine, Request
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.models import parameters

PROMPT, END, LENGTH = (3, 5), 1, 3
IDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def every(decoder: Decoder) -> dict[tuple[int, ...], float]:
    """Every continuation of up to three of four ids, and its log-probability by the full forward pass."""
    model = decoder.definition.merge(decoder.params)
    whole = np.asarray([PROMPT + ids for ids in itertools.product(IDS, repeat=LENGTH)], np.int32)
    logits = jax.jit(lambda ids: model(ids).logits)(whole)[:, 1:-1, :29]
    each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), whole[:, 2:, None], axis=-1)[..., 0]
    return {
        prefix: float(row[: len(prefix)].sum()) for ids, row in zip(whole, each, strict=True) for prefix in _ends(ids)
    }


def _ends(ids: np.ndarray) -> Iterator[tuple[int, ...]]:
    """The continuation in a row, up to the end of the document if there is one."""
    own = tuple(ids[2:].tolist())
    yield own[: own.index(END) + 1] if END in own else own


def _searched(decoder: Decoder, request: Request, **options: Any) -> list[Any]:
    allowed = np.zeros(29, bool)
    allowed[list(IDS)] = True
    return beam_search(decoder, request, allowed=allowed, end=END, **options)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_with_enough_beams_it_is_the_best_of_all(
    decoder: Decoder, every: dict[tuple[int, ...], float], length_penalty: float
) -> None:
    request = Request(tokens=PROMPT, num_tokens=LENGTH)
    found = _searched(decoder, request, num_beams=14, length_penalty=length_penalty)
    scores = {ids: total / len(ids) ** length_penalty for ids, total in every.items()}
    expected = sorted(scores, key=lambda ids: -scores[ids])[:14]
    # Of two equal to rounding either may come first: there are none.
    assert [hypothesis.tokens for hypothesis in found] == expected
    # Logits up to about 10 are sums of some ten float32 products, in another order, and there are three of them.
    for name, values in (("log_probability", every), ("score", scores)):
        ours = [getattr(hypothesis, name) for hypothesis in found]
        np.testing.assert_allclose(ours, [values[ids] for ids in expected], rtol=0, atol=3 * 10 * 32 * 2.0**-24)
    assert [hypothesis.finished for hypothesis in found] == ["end" if ids[-1] == END else "length" for ids in expected]


def test_one_beam_is_the_greedy_text(decoder: Decoder) -> None:
    greedy = Request(tokens=PROMPT, num_tokens=6, sampling=SamplingConfig(temperature=0.0))
    expected = [token for part in Engine(decoder, rows=1).run([greedy]) for token in part.tokens]
    (found,) = beam_search(decoder, greedy, num_beams=1)
    assert list(found.tokens) == expected
    assert found.finished == "length"


def test_it_goes_on_from_a_state(decoder: Decoder) -> None:
    request = Request(tokens=PROMPT, num_tokens=LENGTH)
    read = decoder.prefill(np.asarray([PROMPT], np.int32))
    behind = dataclasses.replace(request, tokens=(), start=read, history=PROMPT)
    assert _searched(decoder, behind, num_beams=4) == _searched(decoder, request, num_beams=4)


def test_bad_input_is_one_line(decoder: Decoder) -> None:
    request = Request(tokens=PROMPT, num_tokens=LENGTH)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_beams": 0}, r"beams must lie in 1 .. 14, half of the ids, got 0"),
        ({"num_beams": 15}, r"got 15"),
        ({"num_beams": 2, "length_penalty": float("nan")}, r"length penalty must be a finite number, got nan"),
    )
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            beam_search(decoder, request, **options)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        beam_search(decoder, dataclasses.replace(request, tokens=()), num_beams=2)
    broken = jax.tree.map(lambda array: array * jnp.nan, decoder.params)
    with pytest.raises(InputError, match="logits are not finite"):
        beam_search(Decoder(parameters.define(decoder.definition.config), broken), request, num_beams=2)
