"""A round of speculative decoding as one program."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from mamba_jax.generation.penalties import History
from mamba_jax.generation.rows import AT_REST, FAILED, Choice, Drawn
from mamba_jax.generation.sampling import log_distribution, log_probabilities, row_keys
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.parameters import ModelDefinition, Params
from mamba_jax.models.reading.prompts import as_before, read_token
from mamba_jax.models.state import LMState, chosen_rows, one_of_each_row

# What a random number of a position is for.
_PROPOSE, _ACCEPT, _REPLACE = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The two models, and sizes that programs are compiled for.

    Attributes:
        target: the model whose text it is.
        draft: the model that proposes.
        num_proposals: k.
        block: T, settled tokens that the target's state moves over at a time.
    """

    target: ModelDefinition
    draft: ModelDefinition
    num_proposals: int
    block: int


# Not checked at construction: JAX also builds these classes around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts between two rounds.

    Attributes:
        target: state of the target before the pending tokens.
        draft: state of the draft before the last token.
        pending: settled tokens that `target` has not read, from the left, (B, T + k + 1) int32.
        count: how many they are, 1 to T, (B,).
        seeds: what is random about each row, (B,) uint32.
        position: tokens drawn so far, (B,).
        left: tokens that may yet be drawn, (B,); rows with 0 are at rest.
        history: the tokens so far, where penalties need them.
    """

    target: LMState
    draft: LMState
    pending: Int[jax.Array, "B P"]
    count: Int[jax.Array, " B"]
    seeds: UInt32[jax.Array, " B"]
    position: Int[jax.Array, " B"]
    left: Int[jax.Array, " B"]
    history: History | None


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Proposed:
    """Tokens of the draft, and what it would go on from behind each of them.

    Attributes:
        tokens: (k + 1, B); the last is not proposed.
        probabilities: of the distributions that they were drawn from, (k + 1, B, V).
        states: before each of these tokens; arrays have a leading axis k + 1.
    """

    tokens: Int[jax.Array, "S B"]
    probabilities: Float[jax.Array, "S B V"]
    states: LMState


def _keys(texts: Texts, index: jax.Array | int, purpose: int) -> jax.Array:
    """Keys of the tokens that are `index` behind the rows' positions, (B,).

    Whether a token is kept depends on random numbers of its own position and of those before. So numbers of positions
    behind, which were drawn for proposals in vain, may be drawn again in the next round.
    """
    keys = row_keys(texts.seeds, texts.position + index)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


@functools.partial(jax.jit, static_argnums=0)
def first_tokens(vocab_size: int, choice: Choice, texts: Texts, logits: jax.Array) -> tuple[Texts, Drawn]:
    """Draws the first token of each row from the target's logits (B, V)."""
    log_p = log_distribution(
        logits, choice.sampling, vocab_size=vocab_size, allowed=choice.allowed, history=texts.history
    )
    drawn = jax.vmap(jax.random.categorical)(_keys(texts, 0, _REPLACE), log_p)
    token_B = jnp.where(jnp.isnan(log_p[:, 0]), FAILED, drawn).astype(jnp.int32)
    log_probability_B = log_probabilities(logits, token_B, vocab_size=vocab_size)
    history = None if texts.history is None else texts.history.added(token_B)
    drawn = Drawn(tokens=token_B[:, None], log_probabilities=log_probability_B[:, None])
    return _with(dataclasses.replace(texts, history=history), drawn.tokens, choice.end), drawn


def _with(texts: Texts, tokens_BS: jax.Array, end: jax.Array | np.ndarray | int) -> Texts:
    """The texts with tokens behind the pending ones; negative ones stand at the end of a row and are left out."""
    added_B = jnp.sum(tokens_BS >= 0, axis=1, dtype=jnp.int32)
    place_BP = jnp.arange(texts.pending.shape[1])[None] - texts.count[:, None]
    moved_BP = jnp.take_along_axis(tokens_BS, jnp.clip(place_BP, 0, tokens_BS.shape[1] - 1), axis=1)
    is_new_BP = (place_BP >= 0) & (place_BP < added_B[:, None])
    is_over_B = jnp.any((tokens_BS == end) | (tokens_BS == FAILED), axis=1)
    return dataclasses.replace(
        texts,
        pending=jnp.where(is_new_BP, moved_BP, texts.pending),
        count=texts.count + added_B,
        position=texts.position + added_B,
        left=jnp.where(is_over_B, 0, texts.left - added_B),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def run_round(
    pair: Pair, params: tuple[Params, Params], choice: Choice, texts: Texts
) -> tuple[Texts, Drawn, jax.Array]:
    """A round: the texts after it, its tokens (B, k + 1), and how many of them were proposed, a scalar."""
    target, draft = pair.target.merge(params[0]), pair.draft.merge(params[1])
    proposed = _propose(pair, draft, choice, texts)
    logits = _verify(pair, target, texts, proposed.tokens[: pair.num_proposals])
    history, drawn, is_accepted = _accept(pair, choice, texts, proposed, logits)
    added_B = jnp.sum(drawn.tokens >= 0, axis=1)
    before = one_of_each_row(pair.draft.config, proposed.states, jnp.maximum(added_B - 1, 0))
    texts = _with(dataclasses.replace(texts, draft=before, history=history), drawn.tokens, choice.end)
    return _settle(pair, target, texts), drawn, jnp.sum(is_accepted)


def _propose(pair: Pair, draft: LanguageModel, choice: Choice, texts: Texts) -> _Proposed:
    """The draft's tokens; it reads the last of them too, for it may be accepted."""

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, _Proposed]:
        token_B, state, history = carry
        read = read_token(draft, token_B, state)
        log_q = log_distribution(
            read.logits,
            choice.sampling,
            vocab_size=pair.draft.config.vocab_size,
            allowed=choice.allowed,
            history=history,
        )
        token_B = jax.vmap(jax.random.categorical)(_keys(texts, index, _PROPOSE), log_q).astype(jnp.int32)
        history = None if history is None else history.added(token_B)
        return (token_B, read.state, history), _Proposed(
            tokens=token_B, probabilities=jnp.exp(log_q), states=read.state
        )

    last_B = jnp.take_along_axis(texts.pending, texts.count[:, None] - 1, axis=1)[:, 0]
    _, proposed = jax.lax.scan(step, (last_B, texts.draft, texts.history), jnp.arange(pair.num_proposals + 1))
    return proposed


def _verify(pair: Pair, target: LanguageModel, texts: Texts, proposed_KB: jax.Array) -> jax.Array:
    """The target's logits for each proposal and for the token behind the last one, (k + 1, B, V)."""
    width, ahead = pair.block + pair.num_proposals, jnp.arange(pair.num_proposals + 1)
    place_BW = jnp.arange(width)[None] - texts.count[:, None]
    moved_BW = jnp.take_along_axis(proposed_KB.T, jnp.clip(place_BW, 0, pair.num_proposals - 1), axis=1)
    # What stands behind the proposals is not attended to.
    tokens_BW = jnp.where(place_BW >= 0, moved_BW, texts.pending[:, :width])
    hidden_BWD = target.hidden(tokens_BW, texts.target).hidden
    at_BS = texts.count[:, None] - 1 + ahead[None]
    hidden_BSD = jnp.take_along_axis(hidden_BWD, at_BS[:, :, None], axis=1)
    return jnp.moveaxis(target.unembed(hidden_BSD), 1, 0)


def _accept(
    pair: Pair, choice: Choice, texts: Texts, proposed: _Proposed, logits_SBV: jax.Array
) -> tuple[History | None, Drawn, jax.Array]:
    r"""The tokens of a round.

        x ~ q is accepted with probability min(1, p(x) / q(x));  else the token is drawn from max(p - q, 0) / sum

    and behind the last proposal from p; so each token is distributed as p, that of the target.

    Args:
        pair: the models.
        choice: how tokens are chosen.
        texts: before the round.
        proposed: x and q.
        logits_SBV: those of p.

    Returns:
        The history after the tokens, the tokens (B, k + 1), and whether each was proposed, (k + 1, B).
    """
    vocab_size = pair.target.config.vocab_size

    def step(carry: tuple, given: tuple) -> tuple[tuple, tuple]:
        history, is_open_B = carry
        index, token_B, q_BV, logits_BV = given
        p_BV = jnp.exp(
            log_distribution(logits_BV, choice.sampling, vocab_size=vocab_size, allowed=choice.allowed, history=history)
        )
        is_proposal = index < pair.num_proposals
        p_B, q_B = (jnp.take_along_axis(x_BV, token_B[:, None], axis=1)[:, 0] for x_BV in (p_BV, q_BV))
        u_B = jax.vmap(jax.random.uniform)(_keys(texts, index, _ACCEPT))
        is_accepted_B = (u_B * q_B < p_B) & is_proposal
        rest_BV = jnp.maximum(p_BV - jnp.where(is_proposal, q_BV, 0), 0)
        # Nothing is left where p and q are equal but for rounding, and NaN where the draft has failed.
        rest_BV = jnp.where(jnp.sum(rest_BV, axis=1, keepdims=True) > 0, rest_BV, p_BV)
        other_B = jax.vmap(jax.random.categorical)(_keys(texts, index, _REPLACE), jnp.log(rest_BV)).astype(jnp.int32)
        token_B = jnp.where(is_accepted_B, token_B, jnp.where(jnp.isnan(p_BV[:, 0]), FAILED, other_B))
        token_B = jnp.where(is_open_B, token_B, AT_REST)
        own_B = log_probabilities(logits_BV, token_B, vocab_size=vocab_size)
        history = None if history is None else history.added(token_B)
        goes_on_B = is_open_B & is_accepted_B & (token_B != choice.end) & (texts.left > index + 1)
        return (history, goes_on_B), (token_B, own_B, is_accepted_B & is_open_B)

    given = (jnp.arange(pair.num_proposals + 1), proposed.tokens, proposed.probabilities, logits_SBV)
    (history, _), (tokens_SB, own_SB, is_accepted_SB) = jax.lax.scan(step, (texts.history, texts.left > 0), given)
    return history, Drawn(tokens=tokens_SB.T, log_probabilities=own_SB.T), is_accepted_SB


def _settle(pair: Pair, target: LanguageModel, texts: Texts) -> Texts:
    """Moves the target's state over a block where more than a block is pending; at least one token stays pending."""
    is_full_B = texts.count > pair.block

    def read_block(texts: Texts) -> Texts:
        read = as_before(target, target.hidden(texts.pending[:, : pair.block], texts.target).state, texts.target)
        return dataclasses.replace(
            texts,
            target=chosen_rows(pair.target.config, is_full_B, read, texts.target),
            pending=jnp.where(is_full_B[:, None], jnp.roll(texts.pending, -pair.block, axis=1), texts.pending),
            count=jnp.where(is_full_B, texts.count - pair.block, texts.count),
        )

    return jax.lax.cond(jnp.any(is_full_B), read_block, lambda texts: texts, texts)
