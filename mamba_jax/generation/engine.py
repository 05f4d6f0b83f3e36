"""Continuous batching: rows that end make room for the next prompts, and nothing is compiled anew."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder, Prefilled
from mamba_jax.generation.penalties import History
from mamba_jax.generation.rows import AT_REST, FAILED, NOT_FINITE, Choice, Drawn, Rows, draw_tokens
from mamba_jax.generation.sampling import Sampling, SamplingConfig
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import placed_rows
from pallas_kernels.common.rounding import round_to_few, round_up

# Shorter prompts are padded to this many tokens.
_SHORTEST = 16
# So many groups of prompts wait in `run`, for prompts that are padded to one length to find each other.
_WAITING_GROUPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A text to be continued.

    Attributes:
        tokens: the prompt's ids; with `start`, what follows it, which may be nothing.
        num_tokens: most tokens to add.
        sampling: how they are drawn.
        seed: what is random about it, in 0 .. 2**32 - 1; text follows from prompt, settings and seed alone.
        start: logits and state (of one row) to go on from; None begins a text.
        history: ids that `start` has read, for penalties.
    """

    tokens: Sequence[int]
    num_tokens: int
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    start: Prefilled | None = None
    history: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What became of a request since its last progress.

    Attributes:
        request: its number, as `submit` gave it.
        tokens: the ids that were added; the one that ends a document among them.
        log_probabilities: of these ids in the model's own distribution.
        finished: why nothing will follow: "end" of the document, "length", or "failed" if logits are not finite; None
            if more will.
    """

    request: int
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finished: Literal["end", "length", "failed"] | None


def check_request(request: Request, *, vocab_size: int, max_length: int | None) -> None:
    """Refuses what cannot be continued.

    Args:
        request: the request.
        vocab_size: the model's ids are below it.
        max_length: most tokens of a text; None is any number.

    Raises:
        InputError: an empty prompt, an id that the model does not have, a number of tokens or a seed out of range, or
            too many tokens.
    """
    count = len(request.history) + len(request.tokens) + request.num_tokens
    if not request.tokens and request.start is None:
        raise InputError("the prompt has no tokens: give at least one")
    if request.num_tokens < 1:
        raise InputError(f"the number of tokens to generate must be positive, got {request.num_tokens}")
    if not 0 <= request.seed < 2**32:
        raise InputError(f"a seed must lie in 0 .. {2**32 - 1}, got {request.seed}")
    for token in request.tokens:
        if not 0 <= token < vocab_size:
            raise InputError(f"the prompt has the token id {token}, but the model's ids are 0 to {vocab_size - 1}")
    if max_length is not None and count > max_length:
        raise InputError(
            f"prompt and continuation would have {count} tokens, but max_length is {max_length}: raise it, or ask for "
            "fewer"
        )
    Sampling.of([request.sampling], vocab_size=vocab_size)


def read_alone(decoder: Decoder, request: Request) -> Prefilled:
    """What the model says after a request's prompt, which is read by itself, behind its start if it has one."""
    if request.start is not None and not request.tokens:
        return request.start
    tokens = np.asarray([request.tokens], np.int32)
    return decoder.prefill(tokens) if request.start is None else decoder.extend(request.start.state, tokens)


@dataclasses.dataclass(eq=False)
class _Active:
    """A request.

    Attributes:
        number: as `submit` gave it.
        request: the request.
        is_open: whether it is neither finished nor given up.
        count: tokens that it got.
        begun: tokens that the programs up to the last one started give it, unless its text ends before.
    """

    number: int
    request: Request
    is_open: bool = True
    count: int = 0
    begun: int = 0


@dataclasses.dataclass(eq=False)
class _Group:
    """Prompts that were read together; None in the place of one that has its row, or needs none."""

    prompts: list[_Active | None]
    read: Prefilled


class Engine:
    """Continues any number of texts on a fixed number of rows.

    A row that ends takes the next prompt. Prompts are read several at once, padded to a few lengths, and those that
    find no row are kept as they were read until one ends. All rows get `steps_per_call` tokens by one program, whose
    result is read while the next one runs. After the first prompt of each length no program is compiled, but for
    settings that no request had before (penalties, biases, min-p).

    A text follows from its own request alone: it is computed by the same programs whatever the other rows do.

    Example:
        engine = Engine(decoder, rows=64, end=tokenizer.end_of_document)
        for progress in engine.run(requests):
            show(progress.request, progress.tokens)

    Args:
        decoder: the model.
        rows: texts that are continued together; more are kept waiting.
        end: the id that ends a text; -1 is none.
        allowed: whether each id may be drawn, (V,); None allows all.
        steps_per_call: tokens that each row gets before the engine looks at them again.
        prompts_per_call: prompts that are read together; None is 8, or `rows` if that is less.

    Raises:
        InputError: a number that is not positive.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int,
        end: int = -1,
        allowed: Bool[np.ndarray, " V"] | None = None,
        steps_per_call: int = 8,
        prompts_per_call: int | None = None,
    ) -> None:
        prompts_per_call = min(rows, 8) if prompts_per_call is None else prompts_per_call
        for name, value in (("rows", rows), ("steps", steps_per_call), ("prompts", prompts_per_call)):
            if value < 1:
                raise InputError(f"the engine's number of {name} must be positive, got {value}")
        self.decoder, self.config = decoder, decoder.definition.config
        self._end, self._steps, self._prompts_per_call = end, steps_per_call, prompts_per_call
        self._allowed = np.ones(self.config.vocab_size, bool) if allowed is None else allowed
        self._slots: list[_Active | None] = [None] * rows
        self._waiting: collections.deque[_Active] = collections.deque()
        self._group: _Group | None = None
        self._unread: collections.deque[tuple[Drawn, list[_Active | None]]] = collections.deque()
        self._count = 0
        zeros = np.zeros(rows, np.int32)
        self._rows = Rows(
            logits=jnp.zeros((rows, self.config.padded_vocab_size), jnp.float32),
            state=decoder.start(rows),
            seeds=jnp.asarray(zeros.astype(np.uint32)),
            position=jnp.asarray(zeros),
            left=jnp.asarray(zeros),
        )

    def run(self, requests: Iterable[Request]) -> Iterator[Progress]:
        """Continues the requests, whose numbers are 0, 1, ... if the engine is new; takes them up as rows get free.

        Raises:
            InputError: a request cannot be continued, or logits are not finite.
        """
        coming = iter(requests)
        while True:
            wanted = self._prompts_per_call * _WAITING_GROUPS + len(self._slots) - self.num_active
            missing = max(0, wanted - len(self._waiting))
            for request in itertools.islice(coming, missing):
                self.submit(request)
            if self.is_idle:
                return
            for progress in self.step():
                if progress.finished == "failed":
                    raise InputError(NOT_FINITE)
                yield progress

    @property
    def num_active(self) -> int:
        """Requests that have a row."""
        return sum(slot is not None for slot in self._slots)

    @property
    def is_idle(self) -> bool:
        """Whether every request is finished."""
        return not (self._waiting or self._group or self._unread or self.num_active)

    def check(self, request: Request) -> None:
        """Refuses what `submit` would refuse."""
        check_request(request, vocab_size=self.config.vocab_size, max_length=self.decoder.max_length)

    def submit(self, request: Request) -> int:
        """Takes a request, to be continued by the calls of `step`, and returns its number.

        Raises:
            InputError: an empty prompt, an id that the model does not have, a number of tokens or a seed out of range,
                or more tokens than the decoder's max_length.
        """
        self.check(request)
        active = _Active(number=self._count, request=request)
        self._count += 1
        self._waiting.append(active)
        return active.number

    def cancel(self, number: int) -> None:
        """Ends a request at once, if it is not finished yet; it has no more progress."""
        self._waiting = collections.deque(active for active in self._waiting if active.number != number)
        begun = [active for _, slots in self._unread for active in slots]
        for active in (*begun, *self._slots, *(self._group.prompts if self._group is not None else ())):
            if active is not None and active.number == number:
                active.is_open = False
        for slot, active in enumerate(self._slots):
            if active is not None and not active.is_open:
                self._slots[slot] = None
                self._rows = dataclasses.replace(self._rows, left=jnp.asarray(self._rows.left).at[slot].set(0))
        if not any(active is not None and active.is_open for active in begun):
            self._unread.clear()
        self._forget_placed()

    def step(self) -> list[Progress]:
        """Gives prompts free rows, starts a program for all rows, and reads what the one before has drawn."""
        while None in self._slots and (self._group is not None or self._waiting):
            if self._group is None:
                self._read_group()
            self._place()
        is_running = self.num_active > 0
        if is_running:
            settings = [SamplingConfig() if active is None else active.request.sampling for active in self._slots]
            sampling = Sampling.of(settings, vocab_size=self.config.vocab_size)
            choice, decoder = Choice(sampling=sampling, allowed=self._allowed, end=self._end), self.decoder
            self._rows, drawn = _continue(decoder.definition, self._steps, decoder.params, choice, self._rows)
            self._unread.append((drawn, list(self._slots)))
            self._release_rows()
        # One program is left running while its predecessor's tokens are looked at.
        return self._read_tokens() if len(self._unread) > is_running else []

    def _release_rows(self) -> None:
        """Frees the rows of texts that get their last tokens, at the latest, by the program just started."""
        for slot, active in enumerate(self._slots):
            if active is not None:
                active.begun += self._steps
                if active.begun >= active.request.num_tokens:
                    self._slots[slot] = None

    def _read_group(self) -> None:
        """Reads the first waiting prompt, and others that are padded to the same length."""
        first = self._waiting[0]
        if first.request.start is not None:
            self._waiting.popleft()
            self._group = _Group(prompts=[first], read=read_alone(self.decoder, first.request))
            return
        length = self.padded_length(len(first.request.tokens))
        beginnings = (active for active in self._waiting if active.request.start is None)
        alike = [active for active in beginnings if self.padded_length(len(active.request.tokens)) == length]
        prompts = alike[: self._prompts_per_call]
        self._waiting = collections.deque(active for active in self._waiting if active not in prompts)
        # Rows without a prompt read one token of padding.
        tokens = np.zeros((self._prompts_per_call, length), np.int32)
        lengths = np.ones(self._prompts_per_call, np.int32)
        for row, active in enumerate(prompts):
            lengths[row] = len(active.request.tokens)
            tokens[row, : lengths[row]] = active.request.tokens
        self._group = _Group(prompts=list(prompts), read=self.decoder.prefill(tokens, lengths))

    def padded_length(self, length: int) -> int:
        """The length that a prompt is padded to, which follows from its own alone: 16, 24, 32, 48, 64, 96, ..."""
        part = self.decoder.part_length
        padded = round_up(length, part) if length > part else round_to_few(length, least=_SHORTEST)
        return min(padded, self.decoder.max_length or padded)

    def _place(self) -> None:
        """Gives prompts of the group that was read the rows that are free."""
        assert self._group is not None
        size, rows, prompts = self._group.read.logits.shape[0], len(self._slots), self._group.prompts
        free = collections.deque(slot for slot, active in enumerate(self._slots) if active is None)
        # Rows of the group without a prompt, and prompts without a row, have a place behind all rows.
        places = np.full(size, rows, np.int32)
        seeds, left = np.zeros(size, np.uint32), np.zeros(size, np.int32)
        ids: list[Sequence[int]] = [[]] * size
        needs_history = False
        for row, active in enumerate(prompts):
            if active is None or not free:
                continue
            places[row], prompts[row] = free[0], None
            self._slots[free.popleft()] = active
            seeds[row], left[row] = active.request.seed, active.request.num_tokens
            ids[row] = [*active.request.history, *active.request.tokens]
            needs_history |= active.request.sampling.has_penalties
        if self._rows.history is None and needs_history:
            # Rows whose own settings have no penalties need none of theirs.
            nothing = History.of_prompts([[]] * rows, vocab_size=self.config.vocab_size)
            self._rows = dataclasses.replace(self._rows, history=nothing)
        new = Rows(
            logits=self._group.read.logits,
            state=self._group.read.state,
            seeds=seeds,
            position=np.zeros(size, np.int32),
            left=left,
            history=None if self._rows.history is None else History.of_prompts(ids, vocab_size=self.config.vocab_size),
        )
        self._rows = _placed(self.decoder.definition, self._rows, places, new)
        self._forget_placed()

    def _forget_placed(self) -> None:
        """Lets go of the group that was read once none of its prompts waits for a row."""
        if self._group is not None:
            self._group.prompts = [active if active and active.is_open else None for active in self._group.prompts]
            if not any(self._group.prompts):
                self._group = None

    def _read_tokens(self) -> list[Progress]:
        """Waits for the oldest program that was not looked at, and hands out its tokens."""
        drawn, slots = self._unread.popleft()
        tokens_BT, log_probabilities_BT = jax.device_get((drawn.tokens, drawn.log_probabilities))
        found = []
        for slot, active in enumerate(slots):
            if active is None or not active.is_open:
                continue
            row = tokens_BT[slot].tolist()
            tokens = [token for token in row if token not in (AT_REST, FAILED)]
            active.count += len(tokens)
            finished = "failed" if FAILED in row else self._why_finished(active, tokens)
            if finished is not None:
                active.is_open = False
                if self._slots[slot] is active:
                    self._slots[slot] = None
            found.append(
                Progress(
                    request=active.number,
                    tokens=tuple(tokens),
                    log_probabilities=tuple(log_probabilities_BT[slot, : len(tokens)].tolist()),
                    finished=finished,
                )
            )
        return found

    def _why_finished(self, active: _Active, tokens: list[int]) -> Literal["end", "length"] | None:
        if tokens and tokens[-1] == self._end:
            return "end"
        return "length" if active.count == active.request.num_tokens else None


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _continue(
    definition: ModelDefinition, num_tokens: int, params: Params, choice: Choice, rows: Rows
) -> tuple[Rows, Drawn]:
    return draw_tokens(definition.merge(params), rows, choice, num_tokens=num_tokens)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _placed(definition: ModelDefinition, rows: Rows, places: jax.Array, new: Rows) -> Rows:
    """The rows with the new ones in these places; those with a place behind the rows are dropped."""
    beside = dataclasses.replace(rows, state={}), dataclasses.replace(new, state={})
    placed = jax.tree.map(lambda all_rows, some: all_rows.at[places].set(some, mode="drop"), *beside)
    return dataclasses.replace(placed, state=placed_rows(definition.config, rows.state, places, new.state))
