"""Limits, time-outs, clients that leave, and a server that stops or breaks."""

import asyncio
import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import openai
import pytest

from mamba_jax.config import MeshConfig, TokenizerConfig
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generator import Generator, GeneratorConfig
from mamba_jax.loaded import Model
from mamba_jax.serve.job import Job
from mamba_jax.serve.limits import Limits
from mamba_jax.serve.schema import parse
from mamba_jax.serve.service import Service
from tests.serve.conftest import Running, post, running, wait_until
from tests.serve.load import END, ENDLESS

# The end of a document has no part in it.
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "a",
    "max_tokens": ENDLESS,
    "temperature": 0,
    "logit_bias": {str(END): -100},
}
SHORT: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 8, "temperature": 0}
ENDLESS_REQUEST = post(json.dumps(LONG).encode())


@pytest.fixture(scope="module")
def small(make_generator: Callable[[], Generator]) -> Iterator[Running]:
    """A server with room for four continuations, and two that wait."""
    with running(make_generator(), max_queue=2, max_body=1000, body_timeout=1.0, max_connections=30) as found:
        yield found


def test_a_client_that_leaves_frees_its_row(small: Running) -> None:
    with small.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        silent = small.connected(ENDLESS_REQUEST)
        small.wait_for(2)
        wait_until(lambda: small.service.generator.engine.num_active == 2)
        stream.close()
        silent.close()
        small.wait_for(0)
        assert small.service.generator.engine.is_idle
        assert client.completions.create(**SHORT).choices[0].finish_reason == "length"


def test_a_full_server_says_so_and_one_that_waits_may_leave(small: Running) -> None:
    working = [small.connected(ENDLESS_REQUEST) for _ in range(4)]
    wait_until(lambda: small.service.generator.engine.num_active == 4)
    waiting = [small.connected(ENDLESS_REQUEST) for _ in range(2)]
    small.wait_for(6)
    with small.client() as client:
        with pytest.raises(openai.RateLimitError, match="ask again later") as full:
            client.completions.create(**SHORT)
        assert full.value.response.headers["retry-after"] == "1"
        waiting[0].close()
        small.wait_for(5)
        answers: list[Any] = []
        late = threading.Thread(target=lambda: answers.append(client.completions.create(**SHORT)))
        late.start()
        small.wait_for(6)
        for connection in (*working, waiting[1]):
            connection.close()
        late.join()
    assert answers[0].choices[0].finish_reason == "length"
    small.wait_for(0)


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to what was sent."""
    with connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, json.loads(response.read())


def test_a_body_that_is_too_large_is_not_read(small: Running) -> None:
    connection = small.connected(post(b"{", length=10**12))
    # It may go on sending while it is told.
    connection.sendall(b" " * 5000)
    status, body = answer(connection)
    assert (status, body["error"]["type"]) == (413, "invalid_request_error")
    assert "more than 1000 bytes" in body["error"]["message"]
    with small.http as asks:
        chunked = asks.post(
            "/v1/completions", content=iter([b" " * 600] * 3), headers={"Content-Type": "application/json"}
        )
    assert chunked.status_code == 413


def test_a_body_that_does_not_come_is_given_up(small: Running) -> None:
    status, body = answer(small.connected(post(b"{", length=100)))
    assert status == 408
    assert "has not come within 1 seconds" in body["error"]["message"]


def test_a_client_that_leaves_before_its_body_has_come_disturbs_nothing(small: Running) -> None:
    small.connected(post(b"{", length=100)).close()
    small.connected(b"no http\r\n\r\n").close()
    with small.client() as client:
        assert client.completions.create(**SHORT).choices[0].finish_reason == "length"
    assert small.service.open == 0


def test_more_clients_than_may_be_connected_are_turned_away(small: Running) -> None:
    idle = [small.connected(b"") for _ in range(30)]
    with small.http as asks:
        wait_until(lambda: asks.get("/health").status_code == 503)
        for connection in idle:
            connection.close()
        wait_until(lambda: asks.get("/health").status_code == 200)


def test_a_defect_is_one_line_for_the_client(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.service, "begin", lambda asked: 1 / 0)
    with small.http as asks:
        found = asks.post("/v1/completions", json=SHORT)
    assert found.status_code == 500
    assert found.json()["error"]["message"] == "a defect of the server (ZeroDivisionError)"


def test_an_answer_that_takes_too_long_ends_in_one_line(served: Generator) -> None:
    with running(served, timeout=0.5) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError, match="0 of 2 continuations were done") as late:
            client.completions.create(**LONG, n=2)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="0 of 1 continuations were done when the time was up"):
            list(client.completions.create(**LONG, stream=True))
        server.wait_for(0)


def test_clients_need_the_key(served: Generator) -> None:
    with running(served, api_key="the key") as server, server.client() as client:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client.completions.create(**SHORT)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        allowed = client.with_options(api_key="the key")
        assert allowed.completions.create(**SHORT).choices[0].finish_reason == "length"


def test_a_server_that_is_told_to_stop_answers_what_it_has_begun(
    served: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, goes_on = served.engine.step, threading.Event()
    monkeypatch.setattr(served.engine, "step", lambda: step() if goes_on.wait(60) else [])
    with running(served) as server, server.client() as client:
        stream = client.completions.create(**SHORT, stream=True)
        server.wait_for(1)
        server.server.stop()
        with server.http as asks:
            wait_until(lambda: asks.get("/health").status_code == 503)
            refused = asks.post("/v1/completions", json=SHORT)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        goes_on.set()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        wait_until(lambda: bool(server.statuses))
    assert server.statuses == [0]
    assert "not answered" not in capsys.readouterr().err


def test_what_is_done_is_sent_whatever_ends_the_server(alone: Generator) -> None:
    async def ended(fails: bool) -> None:
        service = Service(alone, name="tiny", limits=Limits())
        asked = parse(json.dumps(SHORT).encode())
        (text,) = asked.texts()
        continuation = alone.engine.prepare(text)
        job = Job(asked, [continuation], 0.0)
        service._jobs.add(job)
        for piece in alone.engine.follow([continuation]):
            job.arrive(piece)
        if fails:
            service._fail("the engine has failed")
        else:
            assert service.cut() == 0
        assert (await job.next()).generated is not None
        assert not job.has_arrived

    for fails in (False, True):
        asyncio.run(ended(fails))


def test_what_outlasts_the_grace_is_told_so(served: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    with running(served, grace=0.2) as server, server.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        server.server.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        wait_until(lambda: bool(server.statuses))
    assert server.statuses == [0]
    assert "1 requests were not answered" in capsys.readouterr().err


def test_a_second_signal_ends_at_once(served: Generator) -> None:
    with running(served) as server:
        connection = server.connected(ENDLESS_REQUEST)
        server.wait_for(1)
        server.server.stop()
        server.server.stop()
        assert answer(connection)[0] == 503
        wait_until(lambda: bool(server.statuses))
    assert server.statuses == [3]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("no room for 5 bytes"), "out of memory (no room for 5 bytes)"),
        (RuntimeError("a\nb"), "the engine has failed (RuntimeError: a b)"),
    ],
)
def test_an_engine_that_fails_ends_the_server(
    served: Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    step, fails = served.engine.step, threading.Event()

    def failing_step() -> Any:
        if fails.is_set():
            raise error
        return step()

    monkeypatch.setattr(served.engine, "step", failing_step)
    with running(served) as server, server.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        connection = server.connected(ENDLESS_REQUEST)
        server.wait_for(2)
        fails.set()
        status, body = answer(connection)
        assert status == 500
        assert message in body["error"]["message"]
        with pytest.raises(openai.APIError, match=r"engine has failed|out of memory"):
            list(stream)
        wait_until(lambda: bool(server.statuses))
    assert server.statuses == [1]
    assert f"error: {server.service.failure}\n" in capsys.readouterr().err
    for number in list(served.engine._open):
        served.engine.cancel(number)


def test_damaged_weights_fail_a_request_and_not_the_server(served: Generator) -> None:
    definition, params = served._own
    damaged = Model(definition.config, jax.tree.map(lambda leaf: leaf * np.nan, params), tokenizer=TokenizerConfig())
    with running(Generator(damaged, served.config)) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError, match="the model's logits are not finite") as failed:
            client.completions.create(**SHORT)
        assert failed.value.status_code == 500
        with pytest.raises(openai.APIError, match="the model's logits are not finite"):
            list(client.completions.create(**SHORT, stream=True))
        server.wait_for(0)
        assert server.service.failure is None


def test_a_model_on_several_devices_is_served(served: Generator, alone: Generator) -> None:
    definition, params = served._own
    model = Model(definition.config, params, tokenizer=TokenizerConfig())
    split = Generator(model, GeneratorConfig(rows=4, mesh=MeshConfig(data=4, tensor=2)))
    with running(split) as server, server.client() as client:
        found = client.completions.create(**SHORT)
    (expected,) = alone.generate(["a"], num_tokens=8, sampling=SamplingConfig(temperature=0.0))
    assert found.choices[0].text == expected.text


def test_no_descriptor_is_kept(small: Running) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        small.connected(ENDLESS_REQUEST).close()
    small.wait_for(0)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
