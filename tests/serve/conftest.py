"""A server in threads of this process, with a model of random weights."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from mamba_jax.generator import Generator, GeneratorConfig
from mamba_jax.loaded import load
from mamba_jax.serve.limits import Limits
from mamba_jax.serve.server import Server, bind
from mamba_jax.serve.service import Service
from mamba_jax.serve.warm_up import warm_up
from tests.evaluation.conftest import SavedRun, saved_run
from tests.serve.load import ENDLESS

__all__ = ["saved_run"]


@dataclasses.dataclass
class Running:
    """A server that runs.

    Attributes:
        service: what it is made of.
        server: the same.
        port: where it listens.
        statuses: its exit status, once it has ended.
    """

    service: Service
    server: Server
    port: int
    statuses: list[int] = dataclasses.field(default_factory=list)

    @property
    def http(self) -> httpx2.Client:
        """A client of its own for each call."""
        return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def client(self, **options: Any) -> openai.OpenAI:
        """A client that does not try again."""
        return openai.OpenAI(**self.options, **options)

    @property
    def options(self) -> dict[str, Any]:
        """What clients of the openai package need to know."""
        return {"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": "key", "max_retries": 0, "timeout": 60}

    def wait_for(self, count: int) -> None:
        """Waits until so many continuations are open."""
        wait_until(lambda: self.service.open == count)

    def connected(self, content: bytes) -> socket.socket:
        """A connection over which something was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(content)
        return connection


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def post(body: bytes, *, length: int | None = None) -> bytes:
    """A request for completions; `length` is what its header says if not the body's."""
    size = len(body) if length is None else length
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def running(generator: Generator, *, api_key: str | None = None, **limits: Any) -> Iterator[Running]:
    service = Service(generator, name="tiny", limits=Limits(**limits), api_key=api_key)
    bound = bind("127.0.0.1", 0)
    server = Server(service, bound, ready="")
    found = Running(service, server, bound.getsockname()[1])
    thread = threading.Thread(target=lambda: found.statuses.append(server.run()))
    thread.start()
    try:
        with found.http as http:
            wait_until(lambda: _answers(http))
        yield found
    finally:
        server.stop()
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def _answers(http: httpx2.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx2.ConnectError:
        return False


@pytest.fixture(scope="session")
def make_generator(saved_run: SavedRun) -> Callable[[], Generator]:
    """Makes generators of one model, which share their programs."""
    model = load(saved_run.folder)
    return lambda: Generator(model, GeneratorConfig(rows=4, max_length=2 * ENDLESS))


@pytest.fixture(scope="session")
def alone(make_generator: Callable[[], Generator]) -> Generator:
    """What a text is without a server."""
    return make_generator()


@pytest.fixture(scope="session")
def served(make_generator: Callable[[], Generator]) -> Generator:
    """A generator for one server at a time."""
    generator = make_generator()
    warm_up(generator, 16)
    return generator


@pytest.fixture(scope="module")
def server(served: Generator) -> Iterator[Running]:
    with running(served) as found:
        yield found
