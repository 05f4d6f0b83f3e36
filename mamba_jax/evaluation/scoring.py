"""Log-probabilities of given continuations of given texts, as token ids, batched by length."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mamba_jax.errors import InputError
from mamba_jax.evaluation.scoring_programs import Part, Scored, choice_program, context_program, part_program
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.state import init_state, is_endless
from mamba_jax.sharding import batch_shards, make_mesh, put_batch, replicated
from mamba_jax.sharding.config import MeshConfig
from pallas_kernels.common.rounding import round_to_few, round_up

# The ids of a context, and those of what follows it.
Pair = tuple[Sequence[int] | Int[np.ndarray, " _"], Sequence[int] | Int[np.ndarray, " _"]]

# Tokens that rows are padded to at least. A context that is shorter is read again for each of its continuations.
_SHORTEST = 16
# Fewest positions of a row that get logits: words have few tokens. The next sizes are four times as many.
_FEWEST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What a model thinks of a continuation.

    Attributes:
        log_probabilities: of each of its tokens, given all before; (T,) float32, in nats.
        is_greedy: whether each of its tokens is the likeliest one at its place.
    """

    log_probabilities: Float[np.ndarray, " T"]
    is_greedy: bool

    @property
    def log_probability(self) -> float:
        """Of the whole continuation: the sum, in float64."""
        return float(np.sum(self.log_probabilities, dtype=np.float64))


class Scorer:
    """Gives log-probabilities of continuations, many at a time.

    Pairs are sorted by length, and rows are padded behind their end, where nothing that counts is read any more, to
    lengths of which there are two for each doubling. So the number of programs grows with the logarithm of the longest
    text. Longer ones than a part are read in parts, with the state in between, which bounds the memory. Only places
    behind which a token is scored get logits. A context of several continuations, as of a question with choices, is
    read once, and they are read from its state.

    Probabilities are those of the training loss: a softmax in float32 over all rows of the head.

    Args:
        definition: the model.
        params: its parameters.
        batch_size: pairs that are read together; rounded up to a multiple of the devices.
        max_length: most tokens of context and continuation together that the model may see, the last one, which is
            only predicted, not counted; contexts are cut from the left. None cuts nothing.
        part_length: most tokens of a row that are read at once.
        mesh: devices to split batches over; None takes all.

    Raises:
        InputError: a number is not positive.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        params: Params,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        part_length: int = 1024,
        mesh: Mesh | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("part_length", part_length)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be positive, got {value}")
        self.definition, self.max_length, self.part_length = definition, max_length, part_length
        self._mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        self._params = jax.device_put(params, replicated(self._mesh))
        self._batch_size = batch_size
        self._is_endless = is_endless(definition.config)

    def score(self, pairs: Sequence[Pair], *, progress: Callable[[int], None] | None = None) -> list[Score]:
        """Scores continuations, each given its own context alone.

        Args:
            pairs: context and continuation; neither may be empty. A text without a context starts behind the
                end-of-document token.
            progress: called with the number of pairs that are done.

        Returns:
            A score for each pair, in their order.

        Raises:
            InputError: a context or a continuation has no tokens, a continuation has more than `max_length`, an id is
                outside of the vocabulary, or the model gives no probabilities because its weights are not finite.
        """
        texts = [self._text(*pair) for pair in pairs]
        scores: dict[int, Score] = {}
        running: _Running | None = None
        for following in itertools.chain(self._batches(texts), [None]):
            # The host fetches the results of a batch while the devices work on the next one.
            if running is not None:
                scores |= running.collected()
                if progress is not None:
                    progress(len(scores))
            running = following
        return [scores[index] for index in range(len(texts))]

    def _text(self, context: Sequence[int] | np.ndarray, continuation: Sequence[int] | np.ndarray) -> "_Text":
        """What is read for a pair, checked and cut."""
        if not len(continuation):
            raise InputError("a continuation has no tokens: there is nothing to score")
        if not len(context):
            raise InputError("a context has no tokens: give at least one, such as the end of a document")
        ids = np.concatenate([np.asarray(context, np.int64), np.asarray(continuation, np.int64)])
        rows = self.definition.config.padded_vocab_size
        if bad := [token for token in ids.tolist() if not 0 <= token < rows]:
            raise InputError(f"token id {bad[0]} is outside the model's vocabulary of {rows} ids")
        if self.max_length is not None:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, but max_length is {self.max_length}: raise it"
                )
            ids = ids[-(self.max_length + 1) :]
        return _Text(ids=ids.astype(np.int32), num_scored=len(continuation))

    def _batches(self, texts: "list[_Text]") -> "Iterator[_Running]":
        """Starts to read numbered texts, batch by batch, the longest of each kind first."""
        numbered = list(enumerate(texts))
        alone, groups = _by_context(numbered, self.part_length)
        rows = self._rows(len(alone))
        alone.sort(key=lambda entry: -len(entry[1].ids))
        for begin in range(0, len(alone), rows):
            yield self._started(alone[begin : begin + rows], rows)
        rows = self._rows(len(groups))
        groups.sort(key=lambda group: -len(group[0][1].context))
        for begin in range(0, len(groups), rows):
            yield from self._started_choices(groups[begin : begin + rows], rows)

    def _rows(self, count: int) -> int:
        """Rows of a batch of this many texts: a power of two if they are few, so that few programs serve all counts."""
        return round_up(min(self._batch_size, 1 << max(count - 1, 0).bit_length()), batch_shards(self._mesh))

    def _started(self, batch: "list[tuple[int, _Text]]", rows: int) -> "_Running":
        """Starts to read whole texts, the longest first."""
        texts = [text for _, text in batch]
        longest = len(texts[0].ids) - 1
        length = min(round_to_few(longest, least=_SHORTEST), self.part_length)
        parts = [slice(begin, begin + length) for begin in range(0, longest, length)]
        results: list[Scored] = []
        with jax.set_mesh(self._mesh):
            state = None
            if len(parts) > 1:
                # Attention has to remember all parts before; a few sizes serve all texts.
                room = None if self._is_endless else round_to_few(longest, least=_SHORTEST)
                state = init_state(self.definition.config, rows, max_length=room)
            for part in parts:
                arrays = put_batch(self._mesh, _part(texts, rows, part))
                scored, state = part_program(self._mesh)(self.definition, self._params, arrays, state)
                results.append(scored)
                # Processes on CPUs deadlock once 32 programs are in flight.
                jax.block_until_ready(results[-2:-1])
        counts = [[len(text.places(part)) for text in texts] for part in parts]
        return _Running(numbers=[number for number, _ in batch], counts=counts, results=results)

    def _started_choices(self, groups: "list[list[tuple[int, _Text]]]", rows: int) -> "Iterator[_Running]":
        """Starts to read contexts, the longest first, and then the continuations of all."""
        contexts = [group[0][1].context for group in groups]
        tokens = np.zeros((rows, round_to_few(len(contexts[0]), least=_SHORTEST)), np.int32)
        for row, context in enumerate(contexts):
            tokens[row, : len(context)] = context
        lengths = np.ones(rows, np.int32)
        lengths[: len(contexts)] = [len(context) for context in contexts]
        choices = [(owner, number, text) for owner, group in enumerate(groups) for number, text in group]
        choices.sort(key=lambda choice: -choice[2].num_scored)
        room = None if self._is_endless else tokens.shape[1] + round_to_few(choices[0][2].num_scored, least=_SHORTEST)
        with jax.set_mesh(self._mesh):
            placed = put_batch(self._mesh, (tokens, lengths))
            read = context_program(self._mesh)(self.definition, room, self._params, *placed)
        rows = self._rows(len(choices))
        for begin in range(0, len(choices), rows):
            batch = choices[begin : begin + rows]
            # The first token follows from the context, and the others from those before them.
            rest = [_Text(ids=text.continuation, num_scored=text.num_scored - 1) for _, _, text in batch]
            part = _part(rest, rows, slice(0, round_to_few(len(rest[0].ids) - 1, least=_SHORTEST)))
            owners, first = np.zeros((2, rows), np.int32)
            owners[: len(batch)] = [owner for owner, _, _ in batch]
            first[: len(batch)] = [text.continuation[0] for _, _, text in batch]
            with jax.set_mesh(self._mesh):
                arrays = put_batch(self._mesh, (owners, first, part))
                scored = choice_program(self._mesh)(self.definition, self._params, read, *arrays)
            counts = [[text.num_scored for _, _, text in batch]]
            yield _Running(numbers=[number for _, number, _ in batch], counts=counts, results=[scored])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Text:
    """Context and continuation, of which the last `num_scored` tokens are scored."""

    ids: np.ndarray
    num_scored: int

    @property
    def context(self) -> np.ndarray:
        return self.ids[: -self.num_scored]

    @property
    def continuation(self) -> np.ndarray:
        return self.ids[-self.num_scored :]

    def places(self, part: slice) -> np.ndarray:
        """Of the tokens that are followed by a scored one, those in a part, counted from its start."""
        first = max(len(self.ids) - 1 - self.num_scored, part.start)
        return np.arange(first, max(first, min(len(self.ids) - 1, part.stop))) - part.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Running:
    """A batch that the devices work on.

    Attributes:
        numbers: of the texts.
        counts: for each part that was read at once, how many tokens of each text it scores.
        results: of each part.
    """

    numbers: list[int]
    counts: list[list[int]]
    results: list[Scored]

    def collected(self) -> dict[int, Score]:
        """The scores by the number of their text."""
        fetched = [(np.asarray(log_p), np.asarray(is_likeliest)) for log_p, is_likeliest in self.results]
        scores = {}
        for row, number in enumerate(self.numbers):
            counts = [of_part[row] for of_part in self.counts]
            log_p = np.concatenate([found[row, :count] for count, (found, _) in zip(counts, fetched, strict=True)])
            if np.isnan(log_p).any():
                raise InputError("the model's probabilities are NaN: its weights are not finite, take another step")
            is_greedy = all(best[row, :count].all() for count, (_, best) in zip(counts, fetched, strict=True))
            scores[number] = Score(log_probabilities=log_p, is_greedy=is_greedy)
        return scores


def _by_context(
    texts: list[tuple[int, _Text]], longest: int
) -> tuple[list[tuple[int, _Text]], list[list[tuple[int, _Text]]]]:
    """Texts that are read whole, and those that share a context, by context; no part of these is over the longest."""
    groups: dict[bytes, list[tuple[int, _Text]]] = {}
    for number, text in texts:
        groups.setdefault(text.context.tobytes(), []).append((number, text))
    alone: list[tuple[int, _Text]] = []
    shared = []
    for group in groups.values():
        length = len(group[0][1].context)
        is_worth = len(group) > 1 and length >= _SHORTEST
        if is_worth and max(length, *(text.num_scored for _, text in group)) <= longest:
            shared.append(group)
        else:
            alone += group
    return alone, shared


def _part(texts: list[_Text], rows: int, part: slice) -> Part:
    """The arrays of a part of some texts; what is behind the end of a text, and rows without one, are zeros."""
    places = [text.places(part) for text in texts]
    # A part without a scored place asks for no logits at all.
    most = max(map(len, places))
    size = 0 if most == 0 else _FEWEST
    while size < most:
        size *= 4
    tokens = np.zeros((rows, part.stop - part.start), np.int32)
    found = Part(tokens=tokens, places=np.zeros((rows, size), np.int32), targets=np.zeros((rows, size), np.int32))
    for row, (text, at) in enumerate(zip(texts, places, strict=True)):
        read = text.ids[:-1][part]
        tokens[row, : len(read)] = read
        found.places[row, : len(at)] = at
        found.targets[row, : len(at)] = text.ids[part.start + at + 1]
    return found
