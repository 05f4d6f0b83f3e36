"""A request on its way to the engine and back."""

import asyncio
from collections.abc import Sequence

from mamba_jax.generation.rows import NOT_FINITE
from mamba_jax.generation.text_engine import Continuation, Piece
from mamba_jax.serve.refusal import Refusal
from mamba_jax.serve.schema import CompletionRequest


class Job:
    """A request that the engine works on.

    Attributes:
        asked: the request.
        continuations: one for each choice.
        unfinished: choices that have not ended.
        deadline: when it must have been answered, by the event loop's clock.
    """

    def __init__(self, asked: CompletionRequest, continuations: Sequence[Continuation], deadline: float) -> None:
        self.asked, self.continuations, self.deadline = asked, continuations, deadline
        self.unfinished = len(continuations)
        self._arrived: asyncio.Queue[Piece | Refusal] = asyncio.Queue()

    @property
    def has_arrived(self) -> bool:
        """Whether `next` has something to give."""
        return not self._arrived.empty()

    def arrive(self, item: Piece | Refusal) -> None:
        """Takes a piece, or why no more will come."""
        if isinstance(item, Piece):
            self.unfinished -= item.generated is not None
        self._arrived.put_nowait(item)

    async def next(self) -> Piece:
        """The next piece of any choice.

        Raises:
            Refusal: none will come.
        """
        item = await self._arrived.get()
        if isinstance(item, Refusal):
            raise item
        if item.generated is not None and item.generated.finished == "failed":
            raise Refusal(500, NOT_FINITE)
        return item
