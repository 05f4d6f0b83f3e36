"""The HTTP side of a server: addresses, request bodies, and errors as JSON."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mamba_jax.errors import short
from mamba_jax.generation.text_engine import Generated
from mamba_jax.serve.job import Job
from mamba_jax.serve.refusal import Refusal
from mamba_jax.serve.replies import Replies
from mamba_jax.serve.schema import parse
from mamba_jax.serve.service import Service
from mamba_jax.serve.stream import EventStream, out_of_time, unless_gone

# What is read and dropped of a body that is too large, so that its sender comes to read why: seconds, and bodies.
_LINGER_SECONDS, _LINGER_BODIES = 5.0, 8

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """The application: completions, models and health; it starts and stops the service.

    Args:
        service: what answers.
    """
    endpoints = _Endpoints(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = Starlette(
        routes=[
            Route("/health", endpoints.health, methods=["GET"]),
            Route("/v1/models", endpoints.guarded(endpoints.models), methods=["GET"]),
            Route("/v1/models/{name:path}", endpoints.guarded(endpoints.model), methods=["GET"]),
            Route("/v1/completions", endpoints.guarded(endpoints.completions), methods=["POST"]),
            Route("/v1/chat/completions", endpoints.guarded(endpoints.chat), methods=["POST"]),
        ],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _no_such_endpoint,
            ClientDisconnect: _gone,
            Exception: _defect,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _Endpoints:
    """What answers each address."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint for clients with the API key alone."""

        async def checked(request: Request) -> Response:
            self._service.authorise(request.headers.get("authorization"))
            return await endpoint(request)

        return checked

    async def health(self, request: Request) -> Response:
        """Whether requests are taken, and how many continuations there are."""
        self._service.check_running()
        rows = self._service.generator.config.rows
        return JSONResponse({"status": "ready", "rows": rows, "continuations": self._service.open})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model, by its name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        """Refuses chats."""
        raise Refusal(404, "chats are not offered, as the model has no chat template: ask for /v1/completions")

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        self._service.check_running()
        body = await self._body(request)
        asked = await asyncio.to_thread(parse, body)
        self._check_model(asked.model)
        job = await self._service.begin(asked)
        replies = Replies(job, model=self._service.name, tokenizer=self._service.generator.tokenizer)
        if asked.stream:
            return EventStream(job, replies, self._service.end)
        try:
            generated = await unless_gone(request.receive, _all_of(job))
        finally:
            self._service.end(job)
        return JSONResponse(replies.whole(generated))

    def _model(self) -> dict[str, object]:
        return {"id": self._service.name, "object": "model", "created": self._service.created, "owned_by": "mamba-jax"}

    def _check_model(self, name: str) -> None:
        if name != self._service.name:
            raise Refusal(
                404,
                f"there is no model {short(name)}; this server has {self._service.name!r}",
                param="model",
                code="model_not_found",
            )

    async def _body(self, request: Request) -> bytes:
        """The body of a request, which must be JSON and not too large, and come in time."""
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the body is {short(kind)}: send it with 'Content-Type: application/json'")
        limits, body = self._service.limits, bytearray()
        if int(request.headers.get("content-length", 0)) > limits.max_body:
            raise _TooLarge(limits.max_body)
        try:
            async with asyncio.timeout(limits.body_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.max_body:
                        raise _TooLarge(limits.max_body)
        except TimeoutError:
            raise Refusal(
                408,
                f"the body has not come within {limits.body_timeout:g} seconds: send it faster",
                headers={"Connection": "close"},
            ) from None
        return bytes(body)


async def _all_of(job: Job) -> list[Generated]:
    """The continuations of all choices."""
    found: dict[int, Generated] = {}
    try:
        async with asyncio.timeout_at(job.deadline):
            while len(found) < len(job.continuations):
                piece = await job.next()
                if piece.generated is not None:
                    found[piece.prompt] = piece.generated
    except TimeoutError:
        raise out_of_time(job) from None
    return [found[index] for index in range(len(found))]


class _TooLarge(Refusal):
    """A body has more bytes than are read."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            413,
            f"the body has more than {limit} bytes, the most that is read: send less",
            headers={"Connection": "close"},
        )
        self.limit = limit


class _Lingering(JSONResponse):
    """A response to a client that is still sending: closing at once would take it away from under its eyes."""

    def __init__(self, refusal: _TooLarge) -> None:
        super().__init__(refusal.body, refusal.status, refusal.headers)
        self._most = _LINGER_BODIES * refusal.limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                dropped, is_more = 0, True
                while is_more and dropped < self._most:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    is_more = message.get("more_body", False)
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if isinstance(error, _TooLarge):
        return _Lingering(error)
    return JSONResponse(error.body, error.status, error.headers)


async def _no_such_endpoint(request: Request, error: Exception) -> Response:
    """What Starlette refuses: an address that is not there, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    problem = "there is no" if error.status_code == 404 else "wrong method:"
    line = f"{problem} {request.method} {short(request.url.path)}; POST /v1/completions and GET /v1/models are there"
    return JSONResponse(Refusal(error.status_code, line).body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=499)


async def _defect(request: Request, error: Exception) -> Response:
    """The line for the client; the traceback goes to the server's standard error."""
    return JSONResponse(Refusal(500, f"a defect of the server ({type(error).__name__})").body, 500)
