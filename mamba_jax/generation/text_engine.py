"""Continuous batching of texts: prompts in, pieces of text out, for any number of callers of one engine."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import InputError
from mamba_jax.generation.context import Context
from mamba_jax.generation.decoder import Prefilled
from mamba_jax.generation.engine import Engine, Progress, Request
from mamba_jax.generation.sampling import SamplingConfig
from mamba_jax.generation.stop_strings import StopStrings
from mamba_jax.generation.text_stream import TextStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """A continuation.

    Attributes:
        text: the text behind the prompt.
        tokens: the ids that were drawn, up to the one that ended the text.
        log_probabilities: of these ids in the model's own distribution, whatever settings they were drawn with.
        finished: why the text ends: "end" of the document, "stop" string, or "length". A `TextEngine` says "failed" if
            logits are not finite; a `Generator` raises an error then.
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finished: Literal["end", "stop", "length", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What has been added to a continuation since its last piece.

    Attributes:
        prompt: the number of its prompt.
        text: new text, certain to stay; may be empty.
        tokens: the ids that were drawn since the last piece, those whose text is held back among them.
        log_probabilities: of these ids.
        num_tokens: tokens of the continuation so far.
        generated: the whole continuation, if this is its last piece; None before.
    """

    prompt: int
    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    num_tokens: int
    generated: Generated | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A text to be continued.

    Attributes:
        prompt: the text, or its ids.
        num_tokens: most tokens to add.
        sampling: how they are drawn.
        seed: what is random about it, in 0 .. 2**32 - 1.
        stop: strings that end the continuation; they are not shown, nor is any part of them.
        context: what stands in front of the prompt, which then may be empty.
    """

    prompt: str | Sequence[int]
    num_tokens: int
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    stop: Sequence[str] = ()
    context: Context | None = None


def prompt_ids(tokenizer: Tokenizer, text: str, context: Context | None) -> list[int]:
    """The ids of a prompt; behind a context it is no beginning, before which some tokenizers put a space.

    Raises:
        InputError: it has none, and no context stands in front of it.
    """
    tokenizer.check_prompt(text)
    ids = tokenizer.encode_batch([text], continues=[context is not None])[0].tolist()
    if not ids and context is None:
        raise InputError("the prompt is empty: give at least one character")
    return ids


class Continuation:
    """A text that is being continued: its request in token ids, and the text while it grows.

    Attributes:
        prompt: the prompt's text.
        request: what an engine is to do.

    Args:
        tokenizer: that of the model.
        asked: what to continue, and how.

    Raises:
        InputError: a prompt without tokens, an id that the tokenizer does not have, or a stop string of no characters.
    """

    def __init__(self, tokenizer: Tokenizer, asked: TextRequest) -> None:
        context, before = asked.context, []
        if isinstance(asked.prompt, str):
            self.prompt, ids = asked.prompt, prompt_ids(tokenizer, asked.prompt, context)
        else:
            self.prompt, ids = tokenizer.decode(asked.prompt), list(asked.prompt)
        start = None
        if context is not None:
            before, start = context.tokens.tolist(), Prefilled(logits=context.logits[None], state=context.state)
        self.request = Request(
            tokens=ids,
            num_tokens=asked.num_tokens,
            sampling=asked.sampling,
            seed=asked.seed,
            start=start,
            history=before,
        )
        self._stream = TextStream(tokenizer, self.prompt, before + ids)
        self._stop = StopStrings(asked.stop)
        self._tokens: list[int] = []
        self._text, self._log_probabilities = "", []

    def add(self, progress: Progress, number: int) -> Piece:
        """The text that the tokens of a progress make certain, and the whole continuation if they end it."""
        new, finished, before = "", progress.finished, len(self._tokens)
        for token, log_probability in zip(progress.tokens, progress.log_probabilities, strict=True):
            self._tokens.append(token)
            self._log_probabilities.append(log_probability)
            shown = self._stop.add(self._stream.add([token]))
            new += shown.text
            if shown.stopped:
                finished = "stop"
                break
        if finished not in (None, "stop"):
            last = self._stop.add(self._stream.finish())
            new += last.text + self._stop.finish()
            finished = "stop" if last.stopped else finished
        self._text += new
        generated = None
        if finished is not None:
            values: Any = (tuple(self._tokens), tuple(self._log_probabilities))
            generated = Generated(text=self._text, tokens=values[0], log_probabilities=values[1], finished=finished)
        return Piece(
            prompt=number,
            text=new,
            tokens=tuple(self._tokens[before:]),
            log_probabilities=tuple(self._log_probabilities[before:]),
            num_tokens=len(self._tokens),
            generated=generated,
        )


class TextEngine:
    """An `Engine` of texts; not to be used by several threads at once, but for `prepare`.

    Example:
        number = engine.submit(engine.prepare(TextRequest(prompt="The President", num_tokens=100)))
        while not engine.is_idle:
            for piece in engine.step():
                show(piece.prompt, piece.text)  # piece.prompt is the number

    Args:
        engine: what continues token ids.
        tokenizer: that of the model.
        on_mesh: gives the context manager in which the engine's programs run; None for models on one device.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        on_mesh: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._on_mesh = contextlib.nullcontext if on_mesh is None else on_mesh
        self._open: dict[int, Continuation] = {}
        self._inboxes: dict[int, collections.deque[Piece]] = {}

    @property
    def is_idle(self) -> bool:
        """Whether every request is finished."""
        return self._engine.is_idle

    @property
    def num_active(self) -> int:
        """Requests that have a row."""
        return self._engine.num_active

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._open)

    def padded_lengths(self, longest: int) -> list[int]:
        """The lengths that prompts of up to `longest` tokens are padded to; a program is compiled for each."""
        return sorted({self._engine.padded_length(length) for length in range(1, longest + 1)})

    def prepare(self, asked: TextRequest) -> Continuation:
        """Encodes and checks what is asked for; any thread may do it.

        Raises:
            InputError: it cannot be continued.
        """
        continuation = Continuation(self._tokenizer, asked)
        self._engine.check(continuation.request)
        return continuation

    def submit(self, continuation: Continuation) -> int:
        """Takes a request, to be continued by the calls of `step`, and returns its number.

        Raises:
            InputError: it cannot be continued.
        """
        with self._on_mesh():
            number = self._engine.submit(continuation.request)
        self._open[number] = continuation
        return number

    def cancel(self, number: int) -> None:
        """Ends a request at once, if it is not finished yet; it has no more pieces."""
        if self._open.pop(number, None) is not None:
            self._engine.cancel(number)

    def step(self) -> list[Piece]:
        """Continues all requests for a moment; the pieces that have become certain, with the numbers of their requests.

        The last piece of a request whose logits are not finite says "failed"; the others go on.
        """
        with self._on_mesh():
            progress = self._engine.step()
        pieces = []
        for part in progress:
            piece = self._open[part.request].add(part, part.request)
            if piece.generated is not None:
                # It has ended before its tokens do, if a stop string ended it.
                self.cancel(part.request)
            pieces.append(piece)
        return pieces

    def follow(self, continuations: Sequence[Continuation]) -> Iterator[Piece]:
        """Submits requests and gives their pieces, with their places in the sequence; cancels what is not read on.

        Several callers may take turns: each gets its own pieces.

        Raises:
            InputError: a request cannot be continued.
        """
        inbox: collections.deque[Piece] = collections.deque()
        places: dict[int, int] = {}
        try:
            for place, continuation in enumerate(continuations):
                places[number := self.submit(continuation)] = place
                self._inboxes[number] = inbox
            unfinished = len(places)
            while unfinished:
                while not inbox:
                    for piece in self.step():
                        if piece.prompt in self._inboxes:
                            self._inboxes[piece.prompt].append(piece)
                piece = inbox.popleft()
                unfinished -= piece.generated is not None
                yield dataclasses.replace(piece, prompt=places[piece.prompt])
        finally:
            for number in places:
                self._inboxes.pop(number, None)
                self.cancel(number)
