"""What clients get: the texts of the model, whole and in pieces, in the form that the openai package reads."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generator
from tests.serve.conftest import Running

PROMPTS = ["aé a", "é é é é é a\naaé é\n"]
SETTINGS: dict[str, Any] = {"max_tokens": 20, "temperature": 0.8, "seed": 5}
SAMPLING = SamplingConfig(temperature=0.8)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(alone: Generator) -> list[Any]:
    return alone.generate(PROMPTS, num_tokens=20, sampling=SAMPLING, seeds=5)


def test_texts_are_those_of_the_generator(client: openai.OpenAI, expected: list[Any]) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPTS, **SETTINGS)
    assert [choice.text for choice in found.choices] == [text.text for text in expected]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert {choice.finish_reason for choice in found.choices} <= {"stop", "length"}
    assert (found.model, found.object) == ("tiny", "text_completion")
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(prompt.encode()) for prompt in PROMPTS)
    assert found.usage.completion_tokens == sum(len(text.tokens) for text in expected)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_adds_up_to_the_same(client: openai.OpenAI, expected: list[Any]) -> None:
    chunks = client.completions.create(
        model="tiny", prompt=PROMPTS, stream=True, stream_options={"include_usage": True}, **SETTINGS
    )
    *pieces, last = chunks
    texts, reasons = ["", ""], [[], []]
    for chunk in pieces:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index].append(choice.finish_reason)
    assert texts == [text.text for text in expected]
    assert all(before == [None] * len(before) and end in ("stop", "length") for *before, end in reasons)
    assert max(map(len, reasons)) > 1
    assert len({chunk.id for chunk in [*pieces, last]}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(len(text.tokens) for text in expected)


def test_prompts_may_be_ids(client: openai.OpenAI, expected: list[Any]) -> None:
    ids = [list(prompt.encode()) for prompt in PROMPTS]
    found = client.completions.create(model="tiny", prompt=ids, **SETTINGS)
    assert [choice.text for choice in found.choices] == [text.text for text in expected]
    one = client.completions.create(model="tiny", prompt=ids[0], **SETTINGS)
    assert [choice.text for choice in one.choices] == [expected[0].text]


def test_several_choices_of_a_prompt_have_seeds_of_their_own(client: openai.OpenAI, alone: Generator) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPTS[0], n=3, best_of=3, **SETTINGS)
    texts = alone.generate([PROMPTS[0]] * 3, num_tokens=20, sampling=SAMPLING, seeds=5)
    assert [choice.text for choice in found.choices] == [text.text for text in texts]
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(PROMPTS[0].encode())


def test_without_a_seed_texts_differ(client: openai.OpenAI) -> None:
    texts = [client.completions.create(model="tiny", prompt="a", max_tokens=30).choices[0].text for _ in range(2)]
    assert texts[0] != texts[1]


def test_all_settings_are_those_of_the_generator(client: openai.OpenAI, alone: Generator) -> None:
    names: dict[str, Any] = {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.5}
    others: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    found = client.completions.create(
        model="tiny", prompt="aé a", max_tokens=12, seed=1, logit_bias={"97": 4, "98": -100}, extra_body=names, **others
    )
    sampling = SamplingConfig(**names, **others, logit_bias=((97, 4.0), (98, -100.0)))
    (text,) = alone.generate(["aé a"], num_tokens=12, sampling=sampling, seeds=1)
    assert found.choices[0].text == text.text


def test_a_stop_string_ends_a_text(client: openai.OpenAI, expected: list[Any]) -> None:
    stop = expected[0].text[4:6]
    found = client.completions.create(model="tiny", prompt=PROMPTS[0], stop=["not there", stop], **SETTINGS).choices[0]
    assert found.text == expected[0].text[: expected[0].text.find(stop)]
    assert found.finish_reason == "stop"


def test_a_prompt_is_echoed(client: openai.OpenAI, expected: list[Any]) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPTS, echo=True, **SETTINGS)
    whole = [prompt + text.text for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert [choice.text for choice in found.choices] == whole
    texts = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=PROMPTS, echo=True, stream=True, **SETTINGS):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole


def test_log_probabilities_of_drawn_tokens_are_told(client: openai.OpenAI, expected: list[Any]) -> None:
    log = client.completions.create(model="tiny", prompt=PROMPTS[0], logprobs=0, **SETTINGS).choices[0].logprobs
    assert log is not None
    assert log.tokens is not None
    assert log.token_logprobs == list(expected[0].log_probabilities)
    assert [_bytes(token) for token in log.tokens] == [
        b"" if token == 256 else bytes([token]) for token in expected[0].tokens
    ]
    assert log.top_logprobs is None
    for token, place in zip(log.tokens, log.text_offset or [], strict=True):
        assert token.startswith("bytes:") or expected[0].text.startswith(token, place)
    streamed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for chunk in client.completions.create(model="tiny", prompt=PROMPTS[0], logprobs=0, stream=True, **SETTINGS):
        for name, values in streamed.items():
            values += getattr(chunk.choices[0].logprobs, name)
    assert streamed == {name: getattr(log, name) for name in streamed}


def _bytes(token: str) -> bytes:
    hexadecimal = token.removeprefix("bytes:")
    return token.encode() if hexadecimal == token else bytes.fromhex(hexadecimal.replace("\\x", ""))


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has 'tiny'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"prompt": ""}, "the prompt is empty: give at least one character", "prompt"),
        ({"prompt": [257]}, "token id 257 is outside the vocabulary of 257 ids", None),
        ({"prompt": "a" * 10, "max_tokens": 2 * 10**6}, "prompt and continuation would have 2000010 tokens", "prompt"),
        ({"temperature": -1}, "sampling temperature must be finite and not negative, got -1.0", "temperature"),
        ({"logit_bias": {"257": 1}}, "logit_bias has the token id 257, but the model's ids are 0 to 256", "logit_bias"),
        ({"stop": ["a", ""]}, "a stop string has no characters", "stop"),
        ({"n": 128, "prompt": ["a"] * 3}, "384 continuations are asked for, but this server takes 260 at most", None),
        ({"extra_body": {"top_q": 1}}, "there is no field 'top_q'; did you mean 'top_p'?", "top_q"),
    ],
)
def test_what_is_refused_raises_the_error_of_the_package(
    server: Running, client: openai.OpenAI, fields: dict[str, Any], message: str, param: str | None
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 4, **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**asked)
    body = refused.value.body
    assert isinstance(body, dict)
    assert message in body["message"]
    assert body["message"].isprintable()
    assert refused.value.param == param
    assert server.service.open == 0


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (("GET", "/"), 404, "there is no GET '/'"),
        (("POST", "/v1/completions/"), 404, "there is no POST"),
        (("POST", "/v1/chat/completions"), 404, "chats are not offered"),
        (("GET", "/v1/completions"), 405, "wrong method: GET"),
        (("DELETE", "/v1/models/tiny"), 405, "wrong method: DELETE"),
        (("POST", "/v1/completions", "text/plain"), 415, "send it with 'Content-Type: application/json'"),
        (("POST", "/v1/completions"), 400, "the body cannot be read"),
    ],
)
def test_every_error_is_json(server: Running, request_: tuple[str, ...], status: int, message: str) -> None:
    method, path, kind = (*request_, "application/json")[:3]
    with server.http as http:
        found = http.request(method, path, content=b"{", headers={"Content-Type": kind})
    assert found.status_code == status
    assert message in json.loads(found.content)["error"]["message"]
    assert found.content.count(b"\n") == 0
