"""Beam search: the likeliest continuations that a search over several at once finds."""

import dataclasses
import functools
import math
import typing
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_jax.errors import InputError
from mamba_jax.generation.decoder import Decoder, Prefilled
from mamba_jax.generation.engine import Request, check_request, read_alone
from mamba_jax.generation.rows import NOT_FINITE
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.reading.prompts import read_token
from mamba_jax.models.state import LMState, taken_rows

# In the place of a token behind a text's end.
_NOTHING = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A continuation that the search has found.

    Attributes:
        tokens: its ids; the one that ends a document among them.
        log_probability: of all of them together, in nats.
        score: log_probability / (number of tokens)**length_penalty, by which continuations are compared.
        finished: "end" of the document, or "length".
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    finished: Literal["end", "length"]


# Not checked at construction: JAX also builds these classes around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """K continuations, the best first: ids (K, T), their sums of log-probabilities and their scores, both (K,)."""

    tokens: Int[jax.Array, "K T"]
    sums: Float[jax.Array, " K"]
    scores: Float[jax.Array, " K"]


# Not checked at construction, for the same reason.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    """Where a search is: open continuations of `count` tokens with what the model says next, and ended ones."""

    count: Int[jax.Array, ""]
    tokens: Int[jax.Array, "K T"]
    sums: Float[jax.Array, " K"]
    logits: Float[jax.Array, "K V"]
    state: LMState
    ended: _Found


# Not checked at construction, for the same reason.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rules:
    """The arguments of `beam_search` of the same names, as arrays."""

    allowed: Bool[jax.Array, " V"]
    end: Int[jax.Array, ""]
    length_penalty: Float[jax.Array, ""]


def beam_search(
    decoder: Decoder,
    request: Request,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    end: int = -1,
    allowed: Bool[np.ndarray, " V"] | None = None,
) -> list[Hypothesis]:
    """Searches for the continuations of a text with the highest scores.

    At each token the `num_beams` likeliest open continuations are kept; those that end are put aside. The search stops
    when no open one can have a higher score than the worst of `num_beams` that have ended.

    Args:
        decoder: the model.
        request: the prompt, and the most tokens to add; its sampling and seed play no part.
        num_beams: continuations that are kept, at least 1, and at most half of the vocabulary.
        length_penalty: exponent of the length in the score; 0 compares probabilities, larger ones prefer long texts.
        end: the id that ends a text; -1 is none.
        allowed: whether each id may be drawn, (V,); None allows all.

    Returns:
        Up to `num_beams` continuations, the highest score first.

    Raises:
        InputError: what `Engine.submit` refuses; a number of beams or a length penalty out of range; or logits that are
            not finite.

    Source: the search with a set of ended continuations of Wu et al. (arXiv 1609.08144, section 7), with the plain
        power of the length in place of their penalty.
    """
    vocab_size = decoder.definition.config.vocab_size
    check_request(request, vocab_size=vocab_size, max_length=decoder.max_length)
    if not 1 <= num_beams <= vocab_size // 2:
        raise InputError(f"the number of beams must lie in 1 .. {vocab_size // 2}, half of the ids, got {num_beams}")
    if not math.isfinite(length_penalty):
        raise InputError(f"the length penalty must be a finite number, got {length_penalty}")
    rules = _Rules(
        allowed=jnp.ones(vocab_size, bool) if allowed is None else jnp.asarray(allowed),
        end=jnp.asarray(end),
        length_penalty=jnp.float32(length_penalty),
    )
    read = read_alone(decoder, request)
    found = jax.device_get(_search(decoder.definition, num_beams, request.num_tokens, decoder.params, read, rules))
    hypotheses = []
    for ids, total, score in zip(found.tokens.tolist(), found.sums.tolist(), found.scores.tolist(), strict=True):
        if math.isfinite(score):
            tokens = tuple(token for token in ids if token != _NOTHING)
            finished: Literal["end", "length"] = "end" if tokens[-1] == end else "length"
            hypotheses.append(Hypothesis(tokens=tokens, log_probability=total, score=score, finished=finished))
    if not hypotheses:
        raise InputError(NOT_FINITE)
    return hypotheses


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    definition: ModelDefinition,
    num_beams: int,
    num_tokens: int,
    params: Params,
    read: Prefilled,
    rules: _Rules,
) -> _Found:
    """The compiled part of `beam_search`, from what the model says after the prompt."""
    model = definition.merge(params)
    rows = jnp.zeros(num_beams, jnp.int32)
    nothing, never = jnp.full((num_beams, num_tokens), _NOTHING), jnp.full(num_beams, -jnp.inf)
    begin = _Search(
        count=jnp.int32(0),
        tokens=nothing,
        # One continuation of no tokens.
        sums=never.at[0].set(0.0),
        logits=jnp.take(read.logits, rows, axis=0),
        state=taken_rows(definition.config, read.state, rows),
        ended=_Found(tokens=nothing, sums=never, scores=never),
    )

    def can_improve(search: _Search) -> jax.Array:
        # Sums only fall. The length that makes the most of one is the longest, or with a negative penalty the next.
        lengths = jnp.stack([search.count + 1, jnp.full_like(search.count, num_tokens)]).astype(jnp.float32)
        best = jnp.max(search.sums[0] / lengths**rules.length_penalty)
        return (search.count < num_tokens) & (best > search.ended.scores[-1])

    search = jax.lax.while_loop(can_improve, lambda search: _next(model, search, rules), begin)
    # Open continuations count where they have reached the full length; others are worse than all that have ended.
    scores = search.sums / jnp.float32(num_tokens) ** rules.length_penalty
    full = _Found(
        tokens=search.tokens, sums=search.sums, scores=jnp.where(search.count == num_tokens, scores, -jnp.inf)
    )
    return _best(search.ended, full)


def _next(model: LanguageModel, search: _Search, rules: _Rules) -> _Search:
    """The search one token further."""
    num_beams, vocab_size = search.sums.shape[0], rules.allowed.shape[0]
    after = jax.nn.log_softmax(search.logits[:, :vocab_size].astype(jnp.float32), axis=-1)
    sums_KV = search.sums[:, None] + jnp.where(rules.allowed, after, -jnp.inf)
    # At most one next token of each continuation ends it, so that as many as there are beams go on.
    sums, places = jax.lax.top_k(sums_KV.reshape(-1), 2 * num_beams)
    rows, ids = places // vocab_size, places % vocab_size
    tokens = jnp.take(search.tokens, rows, axis=0).at[:, search.count].set(ids)
    is_end = ids == rules.end
    scores = sums / (search.count + 1).astype(jnp.float32) ** rules.length_penalty
    ended = _best(search.ended, _Found(tokens=tokens, sums=sums, scores=jnp.where(is_end, scores, -jnp.inf)))
    open_sums, chosen = jax.lax.top_k(jnp.where(is_end, -jnp.inf, sums), num_beams)
    state = taken_rows(model.config, search.state, rows[chosen])
    read = read_token(model, ids[chosen], state)
    return _Search(
        count=search.count + 1,
        tokens=tokens[chosen],
        sums=open_sums,
        logits=read.logits,
        state=read.state,
        ended=ended,
    )


def _best(ours: _Found, others: _Found) -> _Found:
    """The continuations with the highest scores, as many as `ours` has."""
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), ours, others)
    _, places = jax.lax.top_k(both.scores, ours.scores.shape[0])
    return jax.tree.map(lambda array: array[places], both)
