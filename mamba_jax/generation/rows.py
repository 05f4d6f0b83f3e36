"""Rows of text that are continued together, each at its own place: several tokens in one program."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

from mamba_jax.generation.penalties import History
from mamba_jax.generation.sampling import Sampling, log_probabilities, row_keys, sample
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.reading.prompts import read_token
from mamba_jax.models.state import LMState

# Stand in the place of a token: no token can be drawn, as logits are not finite; and the row is at rest.
FAILED, AT_REST = -1, -2
NOT_FINITE = "the model's logits are not finite, so that no token can be drawn: its weights are damaged or too large"


# Not checked at construction: JAX also builds these classes around shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Texts that are being continued, one a row.

    Attributes:
        logits: of the token to draw next, (B, V) float32.
        state: after the tokens so far; of rows at rest anything.
        seeds: what each row's random numbers follow from, (B,) uint32; see `row_keys`.
        position: tokens drawn so far, (B,) int32.
        left: tokens that may yet be drawn, (B,) int32; rows with 0 are at rest.
        history: the tokens so far, where penalties need them.
    """

    logits: Float[jax.Array, "B V"]
    state: LMState
    seeds: UInt32[jax.Array | np.ndarray, " B"]
    position: Int[jax.Array | np.ndarray, " B"]
    left: Int[jax.Array | np.ndarray, " B"]
    history: History | None = None


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens that were added to rows.

    Attributes:
        tokens: (B, T) int32; `FAILED` where none could be drawn, which ends the row, and `AT_REST` after a row's end.
        log_probabilities: of these tokens in the model's own distribution, (B, T) float32; NaN where there is none.
    """

    tokens: Int[jax.Array, "B T"]
    log_probabilities: Float[jax.Array, "B T"]


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How the tokens of rows are chosen.

    Attributes:
        sampling: with a setting for each row.
        allowed: whether each id may be drawn, (V,), without padding.
        end: the id that ends a row, a scalar; -1 is none.
    """

    sampling: Sampling
    allowed: Bool[jax.Array | np.ndarray, " V"]
    end: Int[jax.Array | np.ndarray, ""] | int = -1


def draw_tokens(model: LanguageModel, rows: Rows, choice: Choice, *, num_tokens: int) -> tuple[Rows, Drawn]:
    """Draws tokens for every row that is not at rest, and reads them; to be called inside a jitted function.

    A row's tokens depend on its own logits, state, seed and settings, and on nothing else of the batch but for the
    rounding of matrix products, which may depend on the number of rows.

    Args:
        model: the model.
        rows: before.
        choice: how tokens are chosen.
        num_tokens: T, tokens to draw for each row.

    Returns:
        The rows after these tokens, and the tokens.
    """
    vocab_size = model.config.vocab_size

    def step(rows: Rows, _: None) -> tuple[Rows, tuple[jax.Array, jax.Array]]:
        token_B = sample(
            rows.logits,
            row_keys(rows.seeds, rows.position),
            choice.sampling,
            vocab_size=vocab_size,
            allowed=choice.allowed,
            history=rows.history,
        )
        token_B = jnp.where(rows.left > 0, token_B, AT_REST)
        log_probability_B = log_probabilities(rows.logits, token_B, vocab_size=vocab_size)
        is_drawn_B = token_B >= 0
        read = read_token(model, jnp.where(is_drawn_B, token_B, 0), rows.state)
        after = Rows(
            logits=read.logits,
            state=read.state,
            seeds=rows.seeds,
            position=rows.position + is_drawn_B,
            left=jnp.where(is_drawn_B & (token_B != choice.end), rows.left - 1, 0),
            history=None if rows.history is None else rows.history.added(token_B),
        )
        return after, (token_B, log_probability_B)

    rows, (tokens_TB, log_probabilities_TB) = jax.lax.scan(step, rows, length=num_tokens)
    return rows, Drawn(tokens=tokens_TB.T, log_probabilities=log_probabilities_TB.T)
