"""The process of a server: its socket, signals, and how it ends."""

import asyncio
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from mamba_jax.cli import EXIT_INTERRUPTED
from mamba_jax.errors import InputError, reason
from mamba_jax.serve.app import make_app
from mamba_jax.serve.service import Service

# Seconds for answers that are written already to reach their clients, and for the engine's thread to end.
_LAST_BYTES = 5
_CHECK_SECONDS = 0.05
# Clients keep connections to use them again, most for less than this.
_IDLE_SECONDS = 30
_EXIT_FAILED = 1
# Clients whose connections the system keeps until they are accepted.
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet.

    Raises:
        InputError: the address is taken, is not this machine's, or is none.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port must lie in 0 .. {2**16 - 1}, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise _cannot_serve(host, port, error) from None
    return bound


def _cannot_serve(host: str, port: int, error: Exception) -> InputError:
    why = reason(error) if isinstance(error, OSError) else error
    return InputError(f"cannot serve at {host} port {port} ({why}): choose another --host or --port")


class Server:
    """Serves until a signal comes or the engine fails.

    SIGTERM and Ctrl-C let running requests end, for as long as the limits' `grace`; meanwhile others get status 503. A
    second signal ends what is running, too.

    Args:
        service: what answers.
        bound: the socket to listen on.
        ready: is printed when clients are let in.
    """

    def __init__(self, service: Service, bound: socket.socket, *, ready: str) -> None:
        self._service, self._bound, self._ready = service, bound, ready
        self._num_stops = 0

    def stop(self) -> None:
        """What a signal does; any thread may call it."""
        self._num_stops += 1

    def run(self) -> int:
        """Serves; the exit status: 0, 1 if the engine has failed, or 3 if a second signal came.

        Raises:
            InputError: another process has begun to listen at the address.
        """
        try:
            self._bound.listen(_BACKLOG)
        except OSError as error:
            host, port = self._bound.getsockname()[:2]
            raise _cannot_serve(host, port, error) from None
        return asyncio.run(self._run())

    async def _run(self) -> int:
        config = uvicorn.Config(
            make_app(self._service),
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="on",
            http="h11",
            ws="none",
            loop="asyncio",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            limit_concurrency=self._service.limits.max_connections,
            timeout_graceful_shutdown=_LAST_BYTES,
        )
        server = _Uvicorn(config, self.stop)
        ending = asyncio.create_task(self._end(server))
        await server.serve(sockets=[self._bound])
        return await ending

    async def _end(self, server: uvicorn.Server) -> int:
        """Says when clients are let in, waits for a reason to end, and ends; the exit status."""
        service, clock = self._service, asyncio.get_running_loop().time
        while not server.started:
            await asyncio.sleep(_CHECK_SECONDS)
        print(self._ready, flush=True)
        while not self._num_stops and service.failure is None:
            await asyncio.sleep(_CHECK_SECONDS)
        service.drain()
        end = clock() + service.limits.grace
        while service.open and self._num_stops < 2 and service.failure is None and clock() < end:
            await asyncio.sleep(_CHECK_SECONDS)
        if service.failure is not None:
            print("error:", service.failure, file=sys.stderr)
        if lost := service.cut():
            print(f"{lost} requests were not answered", file=sys.stderr)
        server.should_exit = True
        return _EXIT_FAILED if service.failure is not None else EXIT_INTERRUPTED if self._num_stops > 1 else 0


class _Uvicorn(uvicorn.Server):
    """Leaves it to others what signals do."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop()
