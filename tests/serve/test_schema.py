"""What a client may ask for, and the line that it gets if it asks for something else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_jax.errors import InputError
from mamba_jax.generator import Generator
from mamba_jax.serve.refusal import Refusal
from mamba_jax.serve.schema import CompletionRequest, parse, refused_input


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "a", **fields}).encode()


def test_fields_become_the_settings_of_texts() -> None:
    asked = parse(
        body(
            prompt=[[1, 2], [3]],
            n=2,
            seed=2**32 - 2,
            stop="x",
            temperature=0,
            top_k=5,
            logit_bias={"7": -3},
            presence_penalty=1,
        )
    )
    texts = asked.texts()
    assert [text.prompt for text in texts] == [[1, 2], [1, 2], [3], [3]]
    assert [text.seed for text in texts] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert {text.stop for text in texts} == {("x",)}
    assert {text.num_tokens for text in texts} == {16}
    (sampling,) = {text.sampling for text in texts}
    assert (sampling.temperature, sampling.top_k, sampling.logit_bias) == (0, 5, ((7, -3.0),))
    assert asked.choices == 4


def test_null_is_the_default() -> None:
    names = set(CompletionRequest.model_fields) - {"model", "prompt"}
    plain, nulls = (parse(body(**fields)).texts()[0] for fields in ({}, dict.fromkeys(names)))
    assert (plain.sampling, plain.num_tokens, plain.stop) == (nulls.sampling, nulls.num_tokens, nulls.stop)


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])]
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: list[Any]) -> None:
    assert parse(body(prompt=prompt)).prompt == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "cannot be read"),
        (b'{"model": "tiny", "prompt": "\xff"}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "must be a JSON object, got []"),
        (b'{"prompt": "a"}', "the field 'model' is missing"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature: input should be a finite number"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature: input should be a finite number"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"model": "tiny", "prompt": [' + b"9" * 100 + b"]}", "prompt has the token id 99999"),
        (body(max_token=3), "no field 'max_token'; did you mean 'max_tokens'?"),
        (body(tools=[]), "no field 'tools'; leave it out"),
        (body(suffix="x"), "no field 'suffix'"),
        (body(**{"a\nb" * 5000: 1}), "there is no field"),
        (body(stream_options={"include": True}, stream=True), "no field 'stream_options.include'; did you mean"),
        (body(stream_options={"include_usage": 1}, stream=True), "stream_options.include_usage: input should be"),
        (body(stream_options={}), "no stream is asked for"),
        (body(prompt=[]), "prompt must be a text"),
        (body(prompt=None), "prompt must be a text"),
        (body(prompt=["a", 1]), "got ['a', 1]"),
        (body(prompt=[[1], []]), "none of them empty"),
        (body(prompt=[True]), "got [True]"),
        (body(prompt=[1.5]), "got [1.5]"),
        (body(prompt=[-1]), "prompt has the token id -1"),
        (body(max_tokens=0), "max_tokens: input should be greater than or equal to 1, got 0"),
        (body(max_tokens=2**31), "max_tokens: "),
        (body(max_tokens=3.5), "max_tokens: "),
        (body(n=0), "n: "),
        (body(n=129), "n: "),
        (body(best_of=3, n=2), "best_of is 3"),
        (body(seed=-1), "seed: "),
        (body(stop=[""] * 17), "stop may hold 16 texts"),
        (body(stop=["x" * 1001]), "stop may hold 16 texts"),
        (body(stop=[1]), "stop must be a text or a list of texts, got [1]"),
        (body(logprobs=2), "logprobs is 2"),
        (body(logprobs=0, echo=True), "leave out echo or logprobs"),
        (body(logit_bias={"a": 1}), "'a' is no id"),
        (body(logit_bias={"-1": 1}), "'-1' is no id"),
        (body(logit_bias={"1": "x"}), "logit_bias: input should be a valid number, got 'x'"),
        (body(logit_bias={str(i): 1 for i in range(1025)}), "1024 is the most"),
        (body(stream="yes"), "stream: input should be a valid boolean, got 'yes'"),
    ],
)
def test_bad_bodies_get_one_line(content: bytes, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse(content)
    check(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 1e300}, "frequency_penalty"),
        ({"logit_bias": {"1": 1, "01": 1}}, "logit_bias"),
    ],
)
def test_settings_out_of_range_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as error:
        parse(body(**fields)).texts()
    assert refused_input(error.value).body["error"]["param"] == param


def check(refusal: Refusal) -> None:
    assert refusal.status == 400
    error = refusal.body["error"]
    assert len(error["message"]) < 3000
    assert error["message"].isprintable()
    assert error["type"] == "invalid_request_error"
    json.dumps(refusal.body).encode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**31, 10**30, -1, "", "7"]),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries(
    {"model": st.just("tiny"), "prompt": st.just("a") | VALUES},
    optional={name: VALUES for name in CompletionRequest.model_fields if name not in ("model", "prompt")},
)


@settings(max_examples=150, deadline=None)
@given(content=BODIES.map(lambda fields: json.dumps(fields).encode()) | st.binary(max_size=40))
def test_any_body_is_taken_or_refused(alone: Generator, content: bytes) -> None:
    try:
        texts = parse(content).texts()
        for text in texts:
            alone.engine.prepare(text)
    except Refusal as refusal:
        check(refusal)
    except InputError as error:
        check(refused_input(error))
    else:
        assert texts
