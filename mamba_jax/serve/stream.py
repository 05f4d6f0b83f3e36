"""Work for a client that may leave at any time, and answers that are sent while they grow."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mamba_jax.serve.job import Job
from mamba_jax.serve.refusal import Refusal
from mamba_jax.serve.replies import Replies

# A client that does not read gets so many seconds for the line that says why its stream ends.
_LAST_WORDS = 1.0


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled if the client leaves.

    Args:
        receive: gives the messages of a client whose request has been read.
        work: what is done for it.

    Raises:
        ClientDisconnect: the client has left.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def out_of_time(job: Job) -> Refusal:
    """The refusal of a job that is not done by its deadline."""
    done = len(job.continuations) - job.unfinished
    return Refusal(
        504, f"{done} of {len(job.continuations)} continuations were done when the time was up: ask for fewer tokens"
    )


class EventStream(Response):
    """An answer as server-sent events: a chunk for every piece, and `[DONE]` at the end.

    What goes wrong after the first is told in an event, behind which the stream ends.

    Args:
        job: what is answered.
        replies: writes its chunks.
        end: is called with the job at the end, whatever happens.
    """

    def __init__(self, job: Job, replies: Replies, end: Callable[[Job], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._job, self._replies, self._end = job, replies, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._send_all(send))
        except ClientDisconnect:
            pass
        finally:
            self._end(self._job)

    async def _send_all(self, send: Send) -> None:
        """Sends all events, or those up to the one that says what has gone wrong."""
        last = "[DONE]"
        try:
            async with asyncio.timeout_at(self._job.deadline):
                await self._send_pieces(send)
        except TimeoutError:
            last = json.dumps(out_of_time(self._job).body)
        except Refusal as error:
            last = json.dumps(error.body)
        try:
            async with asyncio.timeout(_LAST_WORDS):
                await send({**_event(last), "more_body": False})
        except TimeoutError:
            raise ClientDisconnect from None

    async def _send_pieces(self, send: Send) -> None:
        """Sends the chunks of all pieces."""
        for chunk in self._replies.beginnings():
            await send(_event(json.dumps(chunk)))
        while self._job.unfinished or self._job.has_arrived:
            for chunk in self._replies.chunks(await self._job.next()):
                await send(_event(json.dumps(chunk)))
            # Neither of the two waits if there is something to take and room to write: others get their turn here.
            await asyncio.sleep(0)
        for chunk in self._replies.endings():
            await send(_event(json.dumps(chunk)))


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
