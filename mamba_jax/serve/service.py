"""Requests on their way to the engine and back: admission, jobs, draining; all of it on one event loop."""

import asyncio
import hmac
import time

from mamba_jax.errors import InputError
from mamba_jax.generation.text_engine import Continuation, Piece, TextEngine
from mamba_jax.generator import Generator
from mamba_jax.serve.job import Job
from mamba_jax.serve.limits import Limits
from mamba_jax.serve.refusal import Refusal
from mamba_jax.serve.schema import CompletionRequest, refused_input
from mamba_jax.serve.worker import Worker

_STOPPING = "the server is shutting down: ask again later"


class Service:
    """What the HTTP side of a server knows of the other one; not to be used outside of its event loop.

    Attributes:
        name: of the model.
        generator: the model; its engine belongs to the worker's thread.
        limits: what clients may do.
        created: when it began, in seconds since 1970.
        open: choices that were taken and have not ended; those of clients that left count until their rows are free.
        failure: one line, once the engine has failed.

    Args:
        generator: the model.
        name: what clients call it.
        limits: what they may do.
        api_key: what they must send; None lets all in.
    """

    def __init__(self, generator: Generator, *, name: str, limits: Limits, api_key: str | None = None) -> None:
        self.generator, self.name, self.limits = generator, name, limits
        self.created = int(time.time())
        self.open = 0
        self.failure: str | None = None
        self._api_key = None if api_key is None else api_key.encode(errors="surrogateescape")
        self._engine: TextEngine = generator.engine
        self._jobs: set[Job] = set()
        self._worker: Worker | None = None
        self._is_draining = self._is_cut = False

    def start(self) -> None:
        """Starts the thread of the engine; to be called in the event loop.

        Pieces come to this loop.
        """
        loop = asyncio.get_running_loop()

        def deliver(pieces: list[tuple[Job, Piece]], ended: int) -> None:
            loop.call_soon_threadsafe(self._deliver, pieces, ended)

        def fail(line: str) -> None:
            loop.call_soon_threadsafe(self._fail, line)

        self._worker = Worker(self._engine, deliver, fail)
        self._worker.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """Ends the thread of the engine; whether it has ended within so many seconds."""
        return self._worker is None or self._worker.stop(timeout)

    def authorise(self, header: str | None) -> None:
        """Refuses clients without the key.

        Args:
            header: what they sent as `Authorization`.
        """
        given = (header or "").removeprefix("Bearer ").encode("latin-1")
        if self._api_key is not None and not hmac.compare_digest(given, self._api_key):
            raise Refusal(
                401,
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def check_running(self) -> None:
        """Refuses everything once the engine has failed or the server is told to stop."""
        if self.failure is not None:
            raise Refusal(503, self.failure)
        if self._is_draining:
            raise Refusal(503, _STOPPING, headers={"Retry-After": "5"})

    async def begin(self, asked: CompletionRequest) -> Job:
        """Takes a request, if there is room; it must be ended by `end`.

        Raises:
            Refusal: the server is stopping or full, or the request cannot be continued.
        """
        self.check_running()
        deadline = asyncio.get_running_loop().time() + self.limits.timeout
        count, most = asked.choices, self.generator.config.rows + self.limits.max_queue
        if count > most:
            raise Refusal(
                400, f"{count} continuations are asked for, but this server takes {most} at most: ask for fewer"
            )
        if self.open + count > most:
            raise Refusal(
                429, "the server has as much to do as it takes: ask again later", headers={"Retry-After": "1"}
            )
        self.open += count
        try:
            continuations = await asyncio.to_thread(self._prepare, asked)
            if self._is_cut or self.failure is not None:
                raise Refusal(503, self.failure or _STOPPING)
        except BaseException:
            self.open -= count
            raise
        job = Job(asked, continuations, deadline)
        self._jobs.add(job)
        assert self._worker is not None, "start comes first"
        self._worker.submit(job)
        return job

    def end(self, job: Job) -> None:
        """Forgets a job; what is unfinished of it is given up."""
        if job in self._jobs:
            self._jobs.remove(job)
            if job.unfinished and self._worker is not None:
                self._worker.cancel(job)

    def drain(self) -> None:
        """Takes no more requests."""
        self._is_draining = True

    def cut(self) -> int:
        """Refuses what is unfinished, too; the number of such requests."""
        self._is_draining = self._is_cut = True
        return self._refuse_unfinished(Refusal(503, _STOPPING))

    def _prepare(self, asked: CompletionRequest) -> list[Continuation]:
        try:
            return [self._engine.prepare(text) for text in asked.texts()]
        except InputError as error:
            raise refused_input(error) from None

    def _deliver(self, pieces: list[tuple[Job, Piece]], ended: int) -> None:
        for job, piece in pieces:
            job.arrive(piece)
        self.open -= ended

    def _fail(self, line: str) -> None:
        self.failure = line
        self._refuse_unfinished(Refusal(500, line))

    def _refuse_unfinished(self, refusal: Refusal) -> int:
        """Ends the jobs of which something is missing; their number. The others are still being sent."""
        unfinished = [job for job in self._jobs if job.unfinished]
        for job in unfinished:
            job.arrive(refusal)
        return len(unfinished)
