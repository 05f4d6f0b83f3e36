"""Speculative decoding: a small model proposes tokens, and a large one reads several of them at once.

No state is ever rolled back. The large model's state moves over settled tokens alone, a block of them at a time; those
behind it are read again together with the proposals. Of the small model the states after each proposal are kept for a
round, and each row goes on from the one where its proposals cease to hold.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder, Prefilled
from mamba_jax.generation.engine import Progress, Request, check_request
from mamba_jax.generation.penalties import History
from mamba_jax.generation.rows import AT_REST, FAILED, NOT_FINITE, Choice, Drawn
from mamba_jax.generation.sampling import Sampling
from mamba_jax.generation.speculative_round import Pair, Texts, first_tokens, run_round
from mamba_jax.models.state import placed_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What speculation has brought.

    Attributes:
        rounds: times that a row's proposals were read by the target.
        proposals: tokens that the draft proposed in them.
        accepted: those of them that became part of a text.
        tokens: tokens of the texts that came of the rounds.
    """

    rounds: int = 0
    proposals: int = 0
    accepted: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float:
        """The share of proposals that was accepted; NaN before the first."""
        return self.accepted / self.proposals if self.proposals else float("nan")


class SpeculativeDecoder:
    """Continues texts of one model with the help of a smaller one; tokens have the same distribution as without it.

    In a round the draft proposes k tokens for each row, the target reads them at once, and each row keeps those up to
    the first that is rejected, and one more token of the target. Rows move on by their own numbers of tokens. A round
    is one program.

    A text follows from its own request, the models and `num_proposals` alone, whatever the other rows are.

    Example:
        decoder = SpeculativeDecoder(Decoder(*large), Decoder(*small))
        for progress in decoder.continue_rows([Request(tokens=prompt, num_tokens=100)], end=tokenizer.end_of_document):
            show(progress)
        print(decoder.statistics.acceptance)

    Attributes:
        target: the model whose text it is.
        draft: the model that proposes; the caller has made sure that their tokenizers agree.
        statistics: of all rounds so far.

    Args:
        target: the model whose text it is.
        draft: the model that proposes.
        num_proposals: k, tokens that are proposed in a round.
        block: settled tokens that the target's state moves over at a time; those behind it, up to this number, are read
            in every round.

    Raises:
        InputError: the models have different numbers of ids, nothing is proposed, or a block is too short for a round.

    Source: arXiv 2211.17192, algorithm 1; arXiv 2302.01318.
    """

    def __init__(self, target: Decoder, draft: Decoder, *, num_proposals: int = 4, block: int = 16) -> None:
        sizes = [decoder.definition.config.vocab_size for decoder in (target, draft)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the draft has {sizes[1]} ids but the model {sizes[0]}: take a draft that was trained with the same "
                "tokenizer"
            )
        if num_proposals < 1:
            raise InputError(f"the number of proposals must be positive, got {num_proposals}")
        if block <= num_proposals:
            raise InputError(
                f"a round may add {num_proposals + 1} tokens, but a block has {block}: make it as long or propose fewer"
            )
        self.target, self.draft, self.statistics = target, draft, Statistics()
        self._pair = Pair(target=target.definition, draft=draft.definition, num_proposals=num_proposals, block=block)

    def continue_rows(
        self, requests: Sequence[Request], *, end: int = -1, allowed: Bool[np.ndarray, " V"] | None = None
    ) -> Iterator[list[Progress]]:
        """Continues texts, one a row, and gives after every round what came to each row that is not finished.

        Args:
            requests: the texts; with a `start`, `history` must hold all ids that it has read, for the draft reads them.
            end: the id that ends a text; -1 is none.
            allowed: whether each id may be drawn, (V,); None allows all.

        Raises:
            InputError: a request that cannot be continued, or logits of the target that are not finite.
        """
        if not requests:
            return
        vocab_size = self.target.definition.config.vocab_size
        longest = [d.max_length for d in (self.target, self.draft) if d.max_length is not None]
        for request in requests:
            check_request(request, vocab_size=vocab_size, max_length=min(longest, default=None))
            if request.start is not None and not request.history:
                raise InputError("a draft has to read what a text goes on from: give its ids as the request's history")
        sampling = Sampling.of([request.sampling for request in requests], vocab_size=vocab_size)
        allowed_V = np.ones(vocab_size, bool) if allowed is None else allowed
        choice = Choice(sampling=sampling, allowed=allowed_V, end=end)
        texts, drawn = self._begin(requests, choice)
        counts = [0] * len(requests)
        params = (self.target.params, self.draft.params)
        while True:
            progress = _progress(requests, counts, jax.device_get(drawn), end)
            yield progress
            if not any(part.finished is None for part in progress):
                return
            texts, drawn, accepted = run_round(self._pair, params, choice, texts)
            self._count(jax.device_get(drawn).tokens, int(accepted))

    def _begin(self, requests: Sequence[Request], choice: Choice) -> tuple[Texts, Drawn]:
        """Both models read the prompts, and the target draws the first token of each row."""
        whole = [[*request.history, *request.tokens] for request in requests]
        if any(request.start is not None for request in requests):
            target = _read_each(self.target, requests)
        else:
            target = _read_together(self.target, whole)
        draft = _read_together(self.draft, whole)
        vocab_size = self.target.definition.config.vocab_size
        history = None
        if choice.sampling.penalties is not None:
            history = History.of_prompts(whole, vocab_size=vocab_size)
        zeros = jnp.zeros(len(requests), jnp.int32)
        texts = Texts(
            target=target.state,
            draft=draft.state,
            pending=jnp.zeros((len(requests), self._pair.block + self._pair.num_proposals + 1), jnp.int32),
            count=zeros,
            seeds=jnp.asarray([request.seed for request in requests], jnp.uint32),
            position=zeros,
            left=jnp.asarray([request.num_tokens for request in requests], jnp.int32),
            history=history,
        )
        return first_tokens(vocab_size, choice, texts, target.logits)

    def _count(self, tokens_BS: np.ndarray, accepted: int) -> None:
        before, rows = self.statistics, int((tokens_BS[:, 0] != AT_REST).sum())
        self.statistics = Statistics(
            rounds=before.rounds + rows,
            proposals=before.proposals + rows * self._pair.num_proposals,
            accepted=before.accepted + accepted,
            tokens=before.tokens + int((tokens_BS >= 0).sum()),
        )


def _read_together(decoder: Decoder, texts: Sequence[Sequence[int]]) -> Prefilled:
    """Reads texts from their beginning, padded to few lengths, so that few programs are compiled."""
    lengths = np.asarray([len(text) for text in texts], np.int32)
    padded = max(16, 1 << int(lengths.max() - 1).bit_length())
    tokens = np.zeros((len(texts), min(padded, decoder.max_length or padded)), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return decoder.prefill(tokens, lengths)


def _read_each(decoder: Decoder, requests: Sequence[Request]) -> Prefilled:
    """Reads texts one after the other, each from its own start."""
    logits, state = [], decoder.start(len(requests))
    for row, request in enumerate(requests):
        if request.start is None:
            read = _read_together(decoder, [request.tokens])
        elif request.tokens:
            read = decoder.extend(request.start.state, np.asarray([request.tokens], np.int32))
        else:
            read = request.start
        logits.append(read.logits)
        state = placed_rows(decoder.definition.config, state, jnp.asarray([row]), read.state)
    return Prefilled(logits=jnp.concatenate(logits), state=state)


def _progress(requests: Sequence[Request], counts: list[int], drawn: Drawn, end: int) -> list[Progress]:
    """What came to each row that was not at rest; `counts`, the tokens of each row so far, are brought up to date."""
    found = []
    for row, request in enumerate(requests):
        tokens = [token for token in drawn.tokens[row].tolist() if token != AT_REST]
        if not tokens:
            continue
        if FAILED in tokens:
            raise InputError(NOT_FINITE)
        counts[row] += len(tokens)
        finished: Literal["end", "length"] | None = "end" if tokens[-1] == end else None
        if finished is None and counts[row] == request.num_tokens:
            finished = "length"
        found.append(
            Progress(
                request=row,
                tokens=tuple(tokens),
                log_probabilities=tuple(drawn.log_probabilities[row, : len(tokens)].tolist()),
                finished=finished,
            )
        )
    return found
